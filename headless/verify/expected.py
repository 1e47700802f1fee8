"""Names and shapes of the tensors in the published files, known without the files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...cascade_core.checkpoints import NETWORKS
from ...cascade_core.hints.kinds import KINDS
from ...cascade_core.networks.config import PRESETS, PUBLISHED_BLOCKS
from ...cascade_core.text.encoder import build_text_model
from ...cascade_core.vision import build_vision_model

Shapes = Mapping[str, tuple[int, ...]]

_PRESETS = {
    "stage_c": "stage_c_3.6b",
    "stage_c_lite": "stage_c_1b",
    "stage_b": "stage_b_1.5b",
    "stage_b_lite": "stage_b_700m",
    "stage_a": "stage_a",
    "effnet_encoder": "compressor",
    "previewer": "previewer",
}
_CLIP_TEXT = {"vocab_size": 49408, "hidden_act": "gelu"}
_BIGG = {
    **_CLIP_TEXT,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
_L_TEXT = {
    **_CLIP_TEXT,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_L_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "projection_dim": 768,
    "image_size": 224,
    "patch_size": 14,
}


def published_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a file of one network in the catalogue, the attention input split."""
    task = name.removeprefix("controlnet_")
    if task in KINDS:
        kind = KINDS[task]
        config = {"c_in": kind.channels, "bottleneck_mode": kind.backbone, "proj_blocks": PUBLISHED_BLOCKS[8]}
        return _network("controlnet", config)
    if name == "text_encoder":
        return _shapes(build_text_model(_BIGG, "meta"))
    if name == "image_encoder":
        return _shapes(build_text_model(_L_TEXT, "meta")) | _shapes(build_vision_model(_L_VISION, "meta"))
    return _network(*PRESETS[_PRESETS[name.removesuffix("_bf16")]])


def differences(shapes: Shapes, expected: Shapes) -> list[str]:
    """Differences between a file's names and shapes and the expected ones, in words; empty if there are none."""
    lists = {
        "missing": expected.keys() - shapes.keys(),
        "unexpected": shapes.keys() - expected.keys(),
        "of another shape": {
            name for name in shapes.keys() & expected.keys() if shapes[name] != expected[name]
        },
    }
    return [
        f"{len(names)} {what} ({', '.join(sorted(names)[:3])}{', …' if len(names) > 3 else ''})"
        for what, names in lists.items()
        if names
    ]


def _network(kind: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return _shapes(NETWORKS[kind].from_config(config))


def _shapes(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
