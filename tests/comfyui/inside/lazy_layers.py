"""The demo's files loaded as under dynamic VRAM, where ComfyUI's layers have no weights until a state dict is loaded.

The CPU has no dynamic VRAM; what decides how layers are made is switched by hand. Versions without it: nothing changes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from comparing import relative
from interop import PROMPT, make_run, only

from cascade_nodes.demo.pipeline import WEIGHTS
from cascade_nodes.nodes import conditioning
from cascade_nodes.nodes.hosts import comfyui

SIDE = 64


@contextmanager
def lazily(lazy: bool) -> Iterator[None]:
    """Layers are made as that version makes them with dynamic VRAM, or without."""
    spec = find_spec("comfy.memory_management")
    memory: Any = import_module("comfy.memory_management") if spec else None
    if not hasattr(memory, "aimdo_enabled"):
        yield
        return
    memory.aimdo_enabled = lazy
    try:
        yield
    finally:
        memory.aimdo_enabled = False


def results(lazy: bool) -> dict[str, torch.Tensor]:
    """What each network makes of the same, loaded one way."""
    with lazily(lazy):
        stage_c = comfyui.load_network("stage_c", WEIGHTS / "demo_stage_c.safetensors", "fp32")
        stage_b = comfyui.load_network("stage_b", WEIGHTS / "demo_stage_b.safetensors", "fp32")
        stage_a = comfyui.load_stage_a(WEIGHTS / "demo_stage_a.safetensors")
        coder = comfyui.load_compressor(
            WEIGHTS / "demo_compressor.safetensors", WEIGHTS / "demo_previewer.safetensors"
        )
        clip = comfyui.load_text_encoder(WEIGHTS / "demo_text_encoder")
        vision = comfyui.load_vision(WEIGHTS / "demo_image_encoder.safetensors")
        control = comfyui.load_controlnet(WEIGHTS / "demo_controlnet_canny.safetensors")
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, SIDE, SIDE, 3, generator=generator)
    output = conditioning.CascadeTextEncode.execute(clip, PROMPT, "")
    prompts = only(output), only(output, 1)
    controlled = comfyui.apply_controlnet(*prompts, control, image, 1.0, 0.0, 1.0)
    return {
        "text": prompts[0][0][0],
        "stage_c": comfyui.sample(make_run("stage_c", stage_c, prompts)).latent,
        "stage_c with a ControlNet": comfyui.sample(make_run("stage_c", stage_c, controlled)).latent,
        "stage_b": comfyui.sample(make_run("stage_b", stage_b, prompts)).latent,
        "stage_a": stage_a.encode(image),
        "compressor": coder.encode(image),
        "image encoder": comfyui.encode_image(vision, image).image_embeds,
    }


def measure() -> dict[str, Any]:
    eager, lazy = results(False), results(True)
    return {name: relative(lazy[name], eager[name]) for name in eager}
