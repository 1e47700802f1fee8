"""Files with the published names and shapes at full size, whose values take no room on the disk."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch

from cascade_nodes.headless.catalogue import FILES
from cascade_nodes.headless.verify.expected import Shapes, published_shapes

_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a file of the catalogue."""
    if name.startswith("comfyui_"):
        inner = published_shapes(name.removeprefix("comfyui_"))
        outer = {f"model.diffusion_model.{key}": shape for key, shape in inner.items()}
        return {**outer, "text_encoder.clip_g.logit_scale": ()}
    return published_shapes(name)


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
