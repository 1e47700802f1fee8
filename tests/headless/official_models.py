"""What ComfyUI's six examples name, small: checkpoints in its layout, ControlNets and pictures; and smaller graphs.

The same bits wherever they are made, so that ComfyUI's process and the tests' own have the same files.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cascade_nodes.cascade_core.checkpoints import (
    ALL_IN_ONE,
    layout_named,
    read_weights,
    write_safetensors,
)
from cascade_nodes.cascade_core.text.encoder import build_text_model
from cascade_nodes.cascade_core.vision import build_vision_model
from cascade_nodes.nodes.hosts.roles import DEMO_FOLDER, DEMO_NAMES
from cascade_nodes.tests.headless.pictured import NAMES, official

WIDTH, IMAGE_WIDTH = 192, 768  # of the demo's prompts; of pictures as published
CLIP = {"num_hidden_layers": 2, "hidden_act": "gelu", "projection_dim": WIDTH}
TEXT = {"hidden_size": 192, "intermediate_size": 192, "num_attention_heads": 3, "vocab_size": 49408, **CLIP}
VISION = {
    **CLIP,
    "projection_dim": IMAGE_WIDTH,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CHECKPOINTS = {
    "stable_cascade_stage_c": ("stage_c", "compressor", "previewer", "text", "vision"),
    "stable_cascade_stage_b": ("stage_b", "stage_a"),
}
PICTURES = {
    "example": (160, 128),
    "mountains": (96, 96),
    "sunset": (128, 128),
    "yosemite_inpaint_example": (192, 160),
}
SIDE = 256
OTHERS = ["3", "6", "7", "34", "41", "47", "50", "51", "54"]  # of the canny example, without Stage B


def write_models(models: Path) -> None:
    """Every file that the examples load, under `models`, in ComfyUI's folders."""
    with torch.random.fork_rng():
        for name, parts in CHECKPOINTS.items():
            tensors = {}
            for part in parts:
                tensors |= layout_named(part, ALL_IN_ONE).from_published(_weights(part))
            write_safetensors(models / "checkpoints" / f"{name}.safetensors", tensors, {})
    (models / "controlnet").mkdir(exist_ok=True)
    for kind in ("canny", "inpainting"):
        target = models / "controlnet" / f"stable_cascade_{kind}.safetensors"
        shutil.copy(DEMO_FOLDER / f"demo_controlnet_{kind}.safetensors", target)


def _weights(part: str) -> dict[str, torch.Tensor]:
    """Weights of the demo, or random ones for the encoders: ComfyUI's layout lacks the demo's vocabulary."""
    torch.manual_seed(len(part))
    if part not in ("text", "vision"):
        tensors = read_weights(DEMO_FOLDER / DEMO_NAMES[part], part)[0]
        if part == "stage_c":  # ComfyUI's own Stage C is always given pictures of the published width
            mapper = tensors["clip_img_mapper.weight"]
            tensors["clip_img_mapper.weight"] = torch.randn(len(mapper), IMAGE_WIDTH).mul_(0.02).to(mapper)
        return tensors
    network: Any = build_text_model(TEXT) if part == "text" else build_vision_model(VISION)
    return {
        name: torch.randn(tensor.shape).mul_(0.05).add_(name.endswith("norm.weight")).half()
        if tensor.is_floating_point()
        else tensor
        for name, tensor in network.state_dict().items()
    }


def write_pictures(folder: Path) -> None:
    """The pictures that the examples start from; the last one has a transparent hole, as the mask editor makes it."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, (name, (width, height)) in enumerate(PICTURES.items()):
        x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
        waves = [np.sin(9 * x + index + colour) * np.cos(7 * y - colour) for colour in range(3)]
        disc = (x - 0.4) ** 2 + (y - 0.5) ** 2 < 0.06
        pixels = np.stack(
            [np.where(disc, 0.9 - 0.2 * colour, 0.5 + wave / 2) for colour, wave in enumerate(waves)], -1
        )
        pixels = (255 * pixels.clip(0, 1)).astype(np.uint8)
        if name.startswith("yosemite"):
            hole = (np.abs(x - 0.5) < 0.2) & (np.abs(y - 0.5) < 0.25)
            pixels = np.dstack([pixels, np.where(hole, 0, 255).astype(np.uint8)])
        Image.fromarray(pixels).save(folder / f"{name}.png")


def smaller(name: str) -> dict[str, Any]:
    """An example of 256 × 256 pixels and few steps."""
    graph = official(name)["prompt"]
    for node in graph.values():
        inputs = node["inputs"]
        if node["class_type"] == "KSampler":
            inputs["steps"] = 5 if name == "text_to_image" else 2
        if node["class_type"] == "StableCascade_EmptyLatentImage":
            inputs |= {"width": SIDE, "height": SIDE}
    return graph


def graphs() -> dict[str, dict[str, Any]]:
    """The examples, and one of the nodes of their kind that stand in none of them."""
    others = {name: node for name, node in smaller("canny_controlnet").items() if name in OTHERS}
    others["3"]["inputs"] |= {"positive": ["a", 0], "negative": ["7", 0]}
    others |= {
        "a": _node(
            "ControlNetApply", conditioning=["6", 0], control_net=["47", 0], image=["51", 0], strength=0.7
        ),
        "b": _node("CheckpointLoaderSimple", ckpt_name="stable_cascade_stage_b.safetensors"),
        "c": _node(
            "ImageScale", image=["50", 0], upscale_method="bicubic", width=0, height=131, crop="center"
        ),
        "d": _node("VAEEncode", pixels=["c", 0], vae=["b", 2]),
        "e": _node("VAEEncode", pixels=["c", 0], vae=["41", 2]),
        "f": _node("StableCascade_SuperResolutionControlnet", image=["50", 0], vae=["b", 2]),
        "g": _node("VAEDecode", samples=["3", 0], vae=["41", 2]),
    }
    return {**{name: smaller(name) for name in NAMES}, "others": others}


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


NODES = sorted({node["class_type"] for graph in graphs().values() for node in graph.values()})

Execute = Callable[[str, dict[str, Any]], tuple[Any, ...]]


def tensors_of(graph: dict[str, Any], execute: Execute) -> dict[str, torch.Tensor]:
    """Every LATENT, IMAGE and MASK of a graph, by node and output.  execute(class_type, inputs): outputs of a node"""
    outputs: dict[str, tuple[Any, ...]] = {}

    def value(entry: Any) -> Any:
        return result(entry[0])[entry[1]] if isinstance(entry, list) else entry

    def result(node_id: str) -> tuple[Any, ...]:
        if node_id not in outputs:
            node = graph[node_id]
            inputs = {name: value(entry) for name, entry in node["inputs"].items() if name != "upload"}
            outputs[node_id] = execute(node["class_type"], inputs)
        return outputs[node_id]

    found = {}
    for node_id, node in graph.items():
        if node["class_type"] not in ("SaveImage", "PreviewImage"):
            for slot, entry in enumerate(result(node_id)):
                tensor = entry["samples"] if isinstance(entry, dict) else entry
                if isinstance(tensor, torch.Tensor):
                    found[f"{node_id} {slot}"] = tensor.contiguous().clone()
    return found
