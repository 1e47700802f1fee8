"""ComfyUI's conditioning nodes and ControlNets, its own and ours, in our samplers and in its own."""

import json
import tempfile
from pathlib import Path
from typing import Any

import comfy.controlnet
import comfy.ldm.cascade.controlnet
import comfy.ops
import native
import torch
from comparing import randomise, relative
from interop import encode, make_run, only
from torch import Tensor

import nodes
from cascade_nodes.cascade_core import checkpoints
from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.cascade_core.hints.control import residual_blocks
from cascade_nodes.demo.pipeline import WEIGHTS
from cascade_nodes.nodes.hosts import comfyui

STEPS = 4


def sample(model: Any, positive: Any, negative: Any, **changed: Any) -> Tensor:
    settings = {"steps": STEPS, "shift": 2.0, **changed}
    return comfyui.sample(make_run("stage_c", model, (positive, negative), **settings)).latent


def masks_and_ranges(model: Any, prompts: Any, other_prompt: Any) -> dict[str, float]:
    """Differences from the plain prompt, of which some must be zero and others must not."""
    positive, negative = prompts
    plain = sample(model, positive, negative)
    area, between = nodes.ConditioningSetArea(), nodes.ConditioningSetTimestepRange()
    combined = only(nodes.ConditioningCombine().combine(positive, positive))
    mixed = only(nodes.ConditioningCombine().combine(positive, other_prompt))
    whole = only(area.append(positive, 256, 256, 0, 0, 1.0))
    half = only(
        nodes.ConditioningCombine().combine(positive, only(area.append(other_prompt, 128, 256, 0, 0, 1.0)))
    )
    always = only(between.set_range(positive, 0.0, 1.0))
    early = only(between.set_range(positive, 0.0, 0.5))
    late = only(nodes.ConditioningCombine().combine(early, only(between.set_range(other_prompt, 0.5, 1.0))))
    return {
        "same: combined with itself": relative(sample(model, combined, negative), plain),
        "same: an area of the whole": relative(sample(model, whole, negative), plain),
        "same: a range of all steps": relative(sample(model, always, negative), plain),
        "other: combined with another": relative(sample(model, mixed, negative), plain),
        "other: another in half the area": relative(sample(model, half, negative), plain),
        "other: another in half the steps": relative(sample(model, late, negative), plain),
    }


def control_nets(folder: Path, width: int, blocks: list[int]) -> tuple[Any, Any]:
    """A ControlNet with the same random weights as our CONTROL_NET, from a file, and as ComfyUI's own."""
    arguments = {"c_in": 3, "c_proj": width, "proj_blocks": blocks}
    network = comfy.ldm.cascade.controlnet.ControlNet(**arguments, operations=comfy.ops.manual_cast).eval()
    weights = randomise(network, 0.03)
    path = folder / "control.safetensors"
    metadata = {"kind": "controlnet", "config": json.dumps(arguments)}
    checkpoints.write_safetensors(path, weights, metadata)
    theirs = comfy.controlnet.T2IAdapter(network, 3, 32, "bilinear", device=torch.device("cpu"))
    return comfyui.load_controlnet(path), theirs


def control(folder: Path, models: dict[str, Any], prompts: Any) -> dict[str, float]:
    """Either ControlNet on either MODEL, through either apply node: alone, chained, and in part of the steps."""
    widths = residual_blocks(models["ours"].model.diffusion_model)
    last = len(widths) - 1
    ours, theirs = control_nets(folder, widths[0], [0, 1, last])
    few, _ = control_nets(folder, widths[0], [0])
    hint = torch.rand(1, 192, 192, 3)
    apply, advanced = nodes.ControlNetApply(), nodes.ControlNetApplyAdvanced()
    positive, negative = prompts

    def run(
        model: str, control_net: Any, strength: float = 1.0, end: float = 1.0, next_control: Any = None
    ) -> Tensor:
        conditioned = advanced.apply_controlnet(positive, negative, control_net, hint, strength, 0.0, end)
        if next_control is not None:
            conditioned = advanced.apply_controlnet(*conditioned, next_control, hint, 0.5, 0.0, 1.0)
        return sample(models[model], *conditioned)

    def simple(model: str, control_net: Any) -> Tensor:
        return sample(models[model], only(apply.apply_controlnet(positive, control_net, hint, 1.0)), negative)

    plain = {name: sample(model, positive, negative) for name, model in models.items()}
    reference = run("native", theirs)
    ksampler = [
        only(nodes.KSampler().sample(
            models[name], 5, STEPS, 2.0, "ddim", "simple",
            *advanced.apply_controlnet(positive, negative, net, hint, 1.0, 0.0, 1.0),
            {"samples": torch.zeros(1, 16, 6, 6)},
        ))["samples"]
        for name, net in (("ours", ours), ("native", theirs))
    ]  # fmt: skip
    results = {
        "same: our ControlNet on our MODEL": relative(run("ours", ours), reference),
        "same: our ControlNet on the native MODEL": relative(run("native", ours), reference),
        "same: native ControlNet on our MODEL": relative(run("ours", theirs), reference),
        "same: ours in KSampler": relative(*ksampler),
        "same: ControlNetApply": relative(simple("ours", ours), simple("native", theirs)),
        "same: without steps": relative(run("ours", ours, end=0.0), plain["ours"]),
        "same: ours after native": relative(
            run("ours", theirs, next_control=few), run("native", theirs, next_control=few)
        ),
        "same: native after ours": relative(
            run("ours", few, next_control=theirs), run("native", few, next_control=ours)
        ),
        "same: order of two": relative(
            run("ours", theirs, 0.5, next_control=few), run("ours", few, 0.5, next_control=ours)
        ),
        "other: with ControlNet": relative(reference, plain["native"]),
        "other: half the strength": relative(run("ours", ours, 0.5), reference),
        "other: half the steps": relative(run("ours", ours, end=0.5), reference),
        "other: a second one": relative(run("ours", ours, next_control=few), reference),
    }  # fmt: skip
    far, _ = control_nets(folder, widths[0], [0, last + 1])
    wide, _ = control_nets(folder, widths[0] + 64, [0])
    for net in (far, wide):
        try:
            run("ours", net)
        except CascadeError:
            continue
        raise AssertionError("A ControlNet of another Stage C was not refused.")
    return results


def measure() -> dict[str, float]:
    clip = comfyui.load_text_encoder(WEIGHTS / "demo_text_encoder")
    prompts = encode("ours", clip)
    other_prompt = only(nodes.CLIPTextEncode().encode(clip, "a small green circle on sky"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = native.wide_stage_c(folder)
        models = {
            "ours": comfyui.load_network("stage_c", path, "fp32"),
            "native": native.model("stage_c", path),
        }
        return {**masks_and_ranges(models["ours"], prompts, other_prompt), **control(folder, models, prompts)}
