"""The fused attention input of published files, split into the modules' three layers, and back."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CascadeError

FUSED = "in_proj_"
THIRDS = ("to_q", "to_k", "to_v")


def split_attention(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`attn.in_proj_{weight,bias}` (3C rows) -> `attn.to_q/to_k/to_v.{weight,bias}`, as views of it.

    Raises CascadeError for rows that do not make three equal parts.
    """
    split: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        stem, fused, leaf = name.rpartition(FUSED)
        if not fused:
            split[name] = tensor
            continue
        if tensor.ndim == 0 or len(tensor) % len(THIRDS):
            raise CascadeError(
                f"{name} has the shape {tuple(tensor.shape)}, whose rows do not make three equal parts as "
                "expected; download the file again."
            )
        for part, rows in zip(THIRDS, tensor.chunk(len(THIRDS), dim=0), strict=True):
            split[f"{stem}{part}.{leaf}"] = rows
    return split


def parts_of_fused(name: str) -> list[str]:
    """The names of the tensors that `fuse_attention` joins into this one, in order: three, or its own alone."""
    stem, fused, leaf = name.rpartition(FUSED)
    return [f"{stem}{part}.{leaf}" for part in THIRDS] if fused else [name]


def fuse_attention(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `split_attention`: `attn.to_q/to_k/to_v` -> the published `attn.in_proj_*`."""
    fused: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        stem, part, leaf = name.rpartition("to_q.")
        if part:
            whole = f"{stem}{FUSED}{leaf}"
            fused[whole] = torch.cat([state_dict[part] for part in parts_of_fused(whole)], dim=0)
        elif not any(f".attn.{part}." in f".{name}" for part in THIRDS[1:]):
            fused[name] = tensor
    return fused
