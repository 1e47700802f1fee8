"""ComfyUI's six examples by its own nodes, networks and samplers: every latent and picture of them.

What loads a file is replaced, since ComfyUI's own knows the published sizes alone: its own Stage C and B in the
small sizes, and our CLIP, image encoder, VAEs and ControlNets as ComfyUI's, which other tests hold to its own.
"""

import base64
import tempfile
from pathlib import Path
from typing import Any

import comfy.k_diffusion.sampling
import comfy.model_sampling
import comfy.samplers
import folder_paths
import native
import safetensors.torch
import torch
from comfy_extras import nodes_canny, nodes_compositing, nodes_mask, nodes_stable_cascade

import nodes
from cascade_nodes.nodes.hosts import comfyui
from cascade_nodes.tests.headless.official_models import (
    NODES,
    graphs,
    tensors_of,
    write_models,
    write_pictures,
)

EXTRAS = (nodes_canny, nodes_compositing, nodes_mask, nodes_stable_cascade)


def measure() -> dict[str, Any]:
    """{example: its tensors by node, as a safetensors file in base64}, the nodes' inputs, and levels of noise."""
    later_noise_from_the_next_seed()
    inputs = folder_paths.get_input_directory()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        write_models(base / "models")
        write_pictures(base / "input")
        run = Comfy(base / "models")
        try:
            folder_paths.set_input_directory(str(base / "input"))
            return {
                "graphs": {name: encoded(tensors_of(graph, run.execute)) for name, graph in graphs().items()},
                "inputs": {class_type: inputs_of(run.node(class_type)) for class_type in NODES},
                "sigmas": sigmas(run.loaded["stable_cascade_stage_c.safetensors"][0]),
            }
        finally:
            folder_paths.set_input_directory(inputs)


def encoded(tensors: dict[str, torch.Tensor]) -> str:
    return base64.b64encode(safetensors.torch.save(tensors)).decode()


def later_noise_from_the_next_seed() -> None:
    """Noise on the CPU as in newer versions; in 0.3.64 the first step repeats the noise of the start."""
    sampling = comfy.k_diffusion.sampling
    x = torch.zeros(4)
    first = sampling.default_noise_sampler(x, seed=5)(None, None)
    if torch.equal(first, torch.randn(4, generator=torch.Generator().manual_seed(5))):
        original = sampling.default_noise_sampler
        sampling.default_noise_sampler = lambda x, seed=None: original(
            x, seed=None if seed is None else seed + 1
        )


def sigmas(model: Any) -> dict[str, list[float]]:
    """Levels of KSampler at some settings of steps and denoise, by Stage C's schedule and by Stage B's."""
    stages = {"2.0": model.get_model_object("model_sampling")}
    stages["1.0"] = comfy.model_sampling.StableCascadeSampling()
    found = {}
    for shift, schedule in stages.items():
        for steps in (1, 7, 20, 1000):
            found[f"{steps} {shift}"] = comfy.samplers.simple_scheduler(schedule, steps).tolist()
    return found


def inputs_of(cls: Any) -> dict[str, list[Any]]:
    """{input: [type, default, least, most]} of a node, in order."""
    kinds = cls.INPUT_TYPES()
    found = {}
    for name, entry in {**kinds["required"], **kinds.get("optional", {})}.items():
        options = entry[1] if len(entry) > 1 else {}
        kind = "COMBO" if isinstance(entry[0], list) else entry[0]
        found[name] = [kind, *(options.get(key) for key in ("default", "min", "max") if kind != "COMBO")]
    return found


class Comfy:
    """ComfyUI's nodes on the files in a folder."""

    def __init__(self, models: Path):
        self.models = models
        self.loaded: dict[str, tuple[Any, ...]] = {}

    def execute(self, class_type: str, inputs: dict[str, Any]) -> tuple[Any, ...]:
        """The outputs of one node."""
        if class_type in ("CheckpointLoaderSimple", "unCLIPCheckpointLoader"):
            return self.checkpoint(inputs["ckpt_name"])
        if class_type == "ControlNetLoader":
            return (comfyui.load_controlnet(self.models / "controlnet" / inputs["control_net_name"]),)
        if class_type == "CLIPVisionEncode":
            inputs = {"crop": "center", **inputs}
        cls = self.node(class_type)
        if hasattr(cls, "define_schema"):
            return cls.execute(**inputs).result
        return getattr(cls(), cls.FUNCTION)(**inputs)

    def node(self, class_type: str) -> Any:
        """A node's class."""
        cls = nodes.NODE_CLASS_MAPPINGS.get(class_type)
        return cls or next(getattr(module, class_type) for module in EXTRAS if hasattr(module, class_type))

    def checkpoint(self, name: str) -> tuple[Any, ...]:
        """MODEL, CLIP, VAE, CLIP_VISION"""
        if name not in self.loaded:
            path = self.models / "checkpoints" / name
            if "stage_c" in name:
                self.loaded[name] = (
                    native.model("stage_c", path),
                    comfyui.load_text_encoder(path),
                    comfyui.load_compressor(path, path),
                    comfyui.load_vision(path),
                )
            else:
                self.loaded[name] = (native.model("stage_b", path), None, comfyui.load_stage_a(path))
        return self.loaded[name]
