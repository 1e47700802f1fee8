"""ControlNets of every backbone in ComfyUI: our apply node against its own, and both hosts against each other."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from comparing import relative
from interop import make_run, only
from torch import Tensor

import nodes
from cascade_nodes.nodes.control import CascadeControlNetApply
from cascade_nodes.nodes.hosts import comfyui, headless
from cascade_nodes.tests.nodes import controlnets, tiny

HOSTS = {"comfyui": comfyui, "headless": headless}
SIZE = (3, 4)
HINTS = {kind: controlnets.hint(kind) for kind in controlnets.CONFIGS}


class Loaded:
    """Stage C and the ControlNets of one host."""

    def __init__(self, name: str, folder: Path, files: dict[str, str]):
        self.host: Any = HOSTS[name]
        self.model = self.host.load_network("stage_c", folder / "tiny_stage_c.safetensors", "fp32")
        self.nets = {
            kind: self.host.load_controlnet(folder / "controlnet" / file) for kind, file in files.items()
        }

    def sample(self, prompts: Any, **changed: Any) -> Tensor:
        settings = {
            "steps": 4,
            "shift": 2.0,
            "cfg": 3.0,
            "cfg_rescale": 0.7,
            "latent": torch.zeros(2, 16, *SIZE),
        }
        run = make_run("stage_c", self.model, prompts, **{**settings, **changed})
        return self.host.sample(run).latent

    def apply(self, prompts: Any, kind: str, *settings: float) -> tuple[list, list]:
        positive, negative = prompts
        strength, start, end = settings or (1.0, 0.0, 1.0)
        return self.host.apply_controlnet(
            positive, negative, self.nets[kind], HINTS[kind], strength, start, end
        )


def ways(one: Loaded, prompts: Any) -> dict[str, Tensor]:
    """What comes of the same applications in one host."""
    latents = {kind: one.sample(one.apply(prompts, kind)) for kind in controlnets.CONFIGS}
    for start, end in ((0.0, 0.5), (0.5, 1.0), (0.25, 0.25), (0.3, 0.45), (0.0, 0.0)):
        latents[f"{start} to {end}"] = one.sample(one.apply(prompts, "canny", 1.0, start, end))
    several = prompts
    for kind, strength in (("canny", 0.8), ("inpaint", 0.5), ("super_resolution", 1.0), ("identity", 2.0)):
        several = one.apply(several, kind, strength, 0.0, 0.6 if kind == "inpaint" else 1.0)
    latents["several"] = one.sample(several)
    with_it = one.apply(prompts, "inpaint")
    latents["positive alone"] = one.sample((with_it[0], prompts[1]))
    latents["negative alone"] = one.sample((prompts[0], with_it[1]))
    other_prompts = one.apply(prompts, "identity")
    latents["each its own"] = one.sample((with_it[0], other_prompts[1]))
    latents["wider than the hint"] = one.sample(with_it, **wide())
    latents["masked"] = one.sample(with_it, **masked())
    latents["none"] = one.sample(prompts)
    return latents


def wide() -> dict[str, Any]:
    return {"latent": torch.zeros(2, 16, 3, 9)}


def masked() -> dict[str, Any]:
    mask = torch.zeros(2, 1, *SIZE)
    mask[..., 2:] = 1
    generator = torch.Generator().manual_seed(4)
    return {"latent": torch.randn(2, 16, *SIZE, generator=generator), "mask": mask}


def same_structure(ours: Any, theirs: Any) -> bool:
    """Two CONDITIONINGs hold the same, and their chains of ControlNets the same settings."""
    for (tokens, values), (their_tokens, their_values) in zip(ours, theirs, strict=True):
        own_chain, other_chain = chain(values), chain(their_values)
        other_values = [{**prompt_values, "control": None} for prompt_values in (values, their_values)]
        if (
            tokens is not their_tokens
            or other_values[0] != other_values[1]
            or len(own_chain) != len(other_chain)
        ):
            return False
        if not all(map(same_settings, own_chain, other_chain)):
            return False
    return True


def chain(values: dict[str, Any]) -> list[Any]:
    """A prompt's ControlNets, the last one first."""
    controls, one = [], values["control"]
    while one is not None:
        controls.append(one)
        one = one.previous_controlnet
    return controls


def same_settings(control: Any, reference: Any) -> bool:
    names = ("patcher", "strength", "timestep_percent_range", "extra_concat_orig")
    return (
        type(control) is type(reference)
        and all(getattr(control, name) == getattr(reference, name) for name in names)
        and torch.equal(control.cond_hint_original, reference.cond_hint_original)
    )


def apply_node(prompts: Any, net: Any, hint: Tensor, strength: float, start: float, end: float) -> Any:
    positive, negative = prompts
    output = CascadeControlNetApply.execute(positive, negative, net, hint, strength, start, end)
    return only(output), only(output, 1)


def against_native_node(one: Loaded, prompts: Any) -> dict[str, Any]:
    """Our node and ControlNetApplyAdvanced, once and after another ControlNet."""
    row = [("canny", 0.7, 0.1, 0.8), ("super_resolution", 1.5, 0.0, 1.0), ("identity", 1.0, 0.5, 1.0)]
    ours = theirs = prompts
    for kind, strength, start, end in row:
        ours = apply_node(ours, one.nets[kind], HINTS[kind], strength, start, end)
        positive, negative = theirs
        theirs = nodes.ControlNetApplyAdvanced().apply_controlnet(
            positive, negative, one.nets[kind], HINTS[kind], strength, start, end
        )
    shared = ours[0][0][1]["control"] is ours[1][0][1]["control"]
    zero = apply_node(prompts, one.nets["canny"], HINTS["canny"], 0.0, 0.0, 1.0)
    return {
        "structure": all(map(same_structure, ours, theirs)) and shared,
        "strength 0 returns the prompts": zero[0] is prompts[0] and zero[1] is prompts[1],
        "pictures": relative(one.sample(ours), one.sample(theirs)),
    }


def measure() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(8)
    prompts = tuple(
        [[torch.randn(1, 9, tiny.TEXT_WIDTH, generator=generator),
          {"pooled_output": torch.randn(1, tiny.POOLED_WIDTH, generator=generator)}]]
        for _ in range(2)
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name, torch.inference_mode(False):
        folder = Path(name)
        network = tiny.NETWORKS["stage_c"].from_config(tiny.CONFIGS["stage_c"])
        tiny.shake(network)
        tiny.save(folder / "tiny_stage_c.safetensors", network, {})
        files = {kind: controlnets.write_controlnet(folder, kind) for kind in controlnets.CONFIGS}
        loaded = {name: Loaded(name, folder, files) for name in HOSTS}
    latents = {name: ways(one, prompts) for name, one in loaded.items()}
    plain = latents["headless"]["none"]
    return {
        "hosts": {
            way: relative(latents["comfyui"][way], latents["headless"][way]) for way in latents["headless"]
        },
        "effect": {
            way: relative(value, plain)
            for way, value in latents["headless"].items()
            if value.shape == plain.shape and way not in ("none", "masked")
        },
        "native node": against_native_node(loaded["comfyui"], prompts),
    }
