"""How much of a LoRA in each of our dialects ComfyUI's own nodes read, and what they make of it."""

import re
from dataclasses import replace
from typing import Any

import comfy.lora
import torch
from comparing import relative

from cascade_nodes.cascade_core.adapters import DIALECTS, Adapter, LowRank, to_dialect
from cascade_nodes.cascade_core.adapters.apply import changed_weight
from cascade_nodes.demo.pipeline import WEIGHTS
from cascade_nodes.nodes.hosts import comfyui

STRENGTH = 0.75


def changes(weights: dict[str, torch.Tensor], prefix: str, pattern: str) -> dict[str, LowRank]:
    """A change of every layer of a host's weights, every third with a magnitude for each column."""
    changed = {}
    for i, (key, weight) in enumerate(sorted(weights.items())):
        name = key.removeprefix(prefix).removesuffix(".weight")
        if weight.ndim < 2 or not (
            key.endswith(".weight") and key.startswith(prefix) and re.search(pattern, name)
        ):
            continue
        down, up = torch.randn(2, *weight.shape[1:]), torch.randn(len(weight), 2, *[1] * (weight.ndim - 2))
        changed[name] = LowRank(
            down, up * 0.1, 1.0, torch.rand(1, weight.shape[1]) + 0.5 if i % 3 == 0 else None
        )
    return changed


def measure() -> dict[str, Any]:
    model = comfyui.load_network("stage_c", WEIGHTS / "demo_stage_c.safetensors", "fp32")
    clip = comfyui.load_text_encoder(WEIGHTS / "demo_text_encoder")
    of_model, of_clip = model.model.state_dict(), clip.cond_stage_model.state_dict()
    stage_c = changes(of_model, "diffusion_model.", "")
    text = changes(of_clip, "clip_g.transformer.", r"^(text_model\.encoder\.layers\.|text_projection)")
    adapter = Adapter("all", "kohya", stage_c, text)
    keys = comfy.lora.model_lora_keys_clip(
        clip.cond_stage_model, comfy.lora.model_lora_keys_unet(model.model, {})
    )
    results: dict[str, Any] = {}
    for name, dialect in DIALECTS.items():
        if dialect.kind != "named":
            continue
        writable = adapter if dialect.text is not None else replace(adapter, text={})
        if dialect.column_magnitude is None:
            writable = replace(
                writable, stage_c={layer: replace(c, magnitude=None) for layer, c in stage_c.items()}
            )
        patches = comfy.lora.load_lora(to_dialect(writable, name)[0], keys, log_missing=False)
        errors = []
        for key, patch in patches.items():
            weight = (of_model.get(key) if key in of_model else of_clip[key]).float()
            layer = (
                key.removeprefix("diffusion_model.")
                .removeprefix("clip_g.transformer.")
                .removesuffix(".weight")
            )
            expected = changed_weight(weight, {**writable.stage_c, **writable.text}[layer], STRENGTH)
            changed = patch.calculate_weight(weight.clone(), key, STRENGTH, 1.0, None, lambda x: x)
            errors.append(relative(changed, expected))
        results[name] = {
            "stage_c": sum(key in of_model for key in patches) / len(writable.stage_c),
            "text": sum(key in of_clip for key in patches) / len(writable.text) if writable.text else None,
            "error": max(errors, default=0.0),
        }
    return results
