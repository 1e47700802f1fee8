"""Files with the published names and shapes at full size, whose values take no room on the disk."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cascade_nodes.cascade_core.checkpoints import NETWORKS
from cascade_nodes.cascade_core.networks.config import PRESETS
from cascade_nodes.cascade_core.text.encoder import build_text_model
from cascade_nodes.cascade_core.vision import build_vision_model
from cascade_nodes.headless.catalogue import FILES

Shapes = Mapping[str, tuple[int, ...]]

_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
_PRESETS = {
    "stage_c": "stage_c_3.6b",
    "stage_c_lite": "stage_c_1b",
    "stage_b": "stage_b_1.5b",
    "stage_b_lite": "stage_b_700m",
    "stage_a": "stage_a",
    "effnet_encoder": "compressor",
    "previewer": "previewer",
}
_BLOCKS = {"proj_blocks": [0, 4, 8, 12, 51, 55, 59, 63]}
_CONTROLNETS = {
    "canny": {"c_in": 1, **_BLOCKS},
    "inpainting": {"c_in": 4, **_BLOCKS},
    "super_resolution": {"c_in": 16, "bottleneck_mode": "large", **_BLOCKS},
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


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a file of the catalogue."""
    task = name.removeprefix("controlnet_")
    if name.startswith("comfyui_"):
        inner = shapes_of(name.removeprefix("comfyui_"))
        outer = {f"model.diffusion_model.{key}": shape for key, shape in inner.items()}
        return {**outer, "text_encoder.clip_g.logit_scale": ()}
    if task in _CONTROLNETS:
        return _network("controlnet", _CONTROLNETS[task])
    if name == "text_encoder":
        return _shapes(build_text_model(_BIGG, "meta"))
    if name == "image_encoder":
        return _shapes(build_text_model(_L_TEXT, "meta")) | _shapes(build_vision_model(_L_VISION, "meta"))
    return _network(*PRESETS[_PRESETS[name.removesuffix("_bf16")]])


def _network(kind: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return _shapes(NETWORKS[kind].from_config(config))


def _shapes(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def write_sparse(path: Path, shapes: Shapes, precision: str) -> None:
    """A whole safetensors file of these tensors, all zeros, as a header before a hole."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * _BYTES[precision]
        header[name] = {"dtype": precision, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def write_published(path: Path, name: str, precision: str | None = None) -> None:
    """A file of the catalogue under another name."""
    stated = FILES[name].precisions
    write_sparse(path, shapes_of(name), precision or (stated[0] if stated else "BF16"))
