"""Prompts' areas from ComfyUI's nodes, as our samplers and KSampler pass them to each of our networks."""

from typing import Any

import comfy.model_management
import native
import torch
from interop import encode, make_run, only
from torch import Tensor

import nodes
from cascade_nodes.cascade_core.networks.layers import resize
from cascade_nodes.demo.pipeline import WEIGHTS
from cascade_nodes.nodes.hosts import comfyui
from cascade_nodes.nodes.hosts.comfyui.areas import Grid

LATENTS = {"stage_c": (1, 16, 6, 6), "stage_b": (1, 4, 64, 64)}  # of 256 × 256 pixels
PRIOR = torch.linspace(-1, 1, 16 * 36).reshape(1, 16, 6, 6)


def in_area(prompt: Any, width: int, height: int, x: int, y: int) -> Any:
    return only(nodes.ConditioningSetArea().append(prompt, width, height, x, y, 1.0))


def in_share(prompt: Any, width: float, height: float, x: float, y: float) -> Any:
    return only(nodes.ConditioningSetAreaPercentage().append(prompt, width, height, x, y, 1.0))


def in_mask(prompt: Any, mask: Tensor) -> Any:
    return only(nodes.ConditioningSetMask().append(prompt, mask, "mask bounds", 1.0))


def grids(models: dict[str, Any], prompt: Any) -> dict[str, list[int] | None]:
    """The areas (height, width, top, left) that prompts become."""
    corner = torch.zeros(1, 256, 256)
    corner[:, 200:, 248:] = 1
    cases = {
        "the left half": in_area(prompt, 128, 256, 0, 0),
        "the right half": in_area(prompt, 128, 256, 128, 0),
        "between positions": in_area(prompt, 64, 104, 72, 64),
        "over the edge": in_area(prompt, 512, 512, 192, 0),
        "outside": in_area(prompt, 64, 64, 1024, 1024),
        "a quarter": in_share(prompt, 0.5, 0.5, 0.5, 0.5),
        "a sliver": in_share(prompt, 0.01, 0.01, 0.99, 0.33),
        "a mask": in_mask(prompt, corner),
        "an empty mask": in_mask(prompt, torch.zeros(1, 256, 256)),
        "no area": prompt,
    }
    device = comfy.model_management.get_torch_device()
    places = {
        "stage_c": Grid(models["stage_c"].model, (6, 6), 42.67),
        "stage_c, 32": Grid(models["stage_c"].model, (8, 8), 32.0),
        "stage_b": Grid(models["stage_b"].model, (64, 64), 42.67),
        "stage_b, odd": Grid(models["stage_b"].model, (51, 75), 42.67),
    }
    found = {}
    for name, conditioning in cases.items():
        cond = dict(conditioning[0][1])
        for stage, grid in places.items():
            once = grid.placed(cond, device)
            twice = grid.placed(once, device)
            assert once.get("area") == twice.get("area")
            found[f"{name}, {stage}"] = list(once["area"]) if "area" in once else None
    return found


def seen(
    kind: str, model: Any, sampler: str, positive: Any, negative: Any, shape: tuple, **settings: Any
) -> Any:
    """The sides of the latents that the network was given in one step, and the parts of the prior with them."""
    sides, priors = [], []

    def note(module: Any, inputs: Any, named: dict[str, Any]) -> None:
        sides.append(list(inputs[0].shape[2:]))
        priors.append(named.get("effnet"))

    hook = model.model.diffusion_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        if sampler == "ours":
            run = make_run(kind, model, (positive, negative), latent=torch.zeros(shape), steps=1, **settings)
            comfyui.sample(run)
        else:
            latent = {"samples": torch.zeros(shape)}
            nodes.KSampler().sample(model, 1, 1, 2.0, "euler", "simple", positive, negative, latent)
    finally:
        hook.remove()
    return sorted(sides), [
        prior for prior, side in zip(priors, sides, strict=True) if side != list(shape[2:])
    ]


def with_prior(prompt: Any, prior: Tensor) -> Any:
    return [[states, {**values, "stable_cascade_prior": prior}] for states, values in prompt]


def measure() -> dict[str, Any]:
    clip = comfyui.load_text_encoder(WEIGHTS / "demo_text_encoder")
    positive, negative = encode("ours", clip)
    models = {
        kind: comfyui.load_network(kind, WEIGHTS / f"demo_{kind}.safetensors", "fp32") for kind in LATENTS
    }
    sides, parts = {}, {}
    for kind, shape in LATENTS.items():
        prompts = positive, negative
        if kind == "stage_b":
            prompts = with_prior(positive, PRIOR), with_prior(negative, torch.zeros_like(PRIOR))
        both = only(nodes.ConditioningCombine().combine(prompts[0], in_area(prompts[0], 128, 256, 128, 0)))
        runs = {"ours": (models[kind], "ours"), "KSampler": (models[kind], "KSampler")}
        if kind == "stage_b":
            runs["ours, native"] = native.model(kind, WEIGHTS / "demo_stage_b.safetensors"), "ours"
        for name, (model, sampler) in runs.items():
            found, priors = seen(kind, model, sampler, both, prompts[1], shape)
            sides[f"{kind}, {name}"] = found
            if kind == "stage_b":
                expected = resize(PRIOR, (32, 32))[..., 16:]
                parts[name] = min(
                    (row - expected[0]).abs().max().item() for prior in priors for row in prior.float()
                )
    finer, _ = seen("stage_c", models["stage_c"], "ours", both, negative, (1, 16, 8, 8), compression=32.0)
    return {"grids": grids(models, positive), "sides": sides, "finer": finer, "parts": parts}
