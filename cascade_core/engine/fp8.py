"""`cuda.py` with the products of the blocks in e4m3: twice the arithmetic a second, for an error of a few hundredths.

A weight has a scale for each output channel, of the network's own weights when they are bound; a feature map one for
each token, found anew each time. Sums are in float32. Everything else is computed as in `cuda.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .cuda import (
    attention,
    compile_ahead,
    depthwise_norm,
    gelu_scale_,
    linear,
    modulate_,
    modulate_norm_,
    norm,
    waiting_room,
)
from .kernels import resident
from .kernels.fp8 import apply_response_quantise, quantise_rows, quantise_weight, quantised_linear

__all__ = [
    "add_linear_",
    "attention",
    "channelwise_",
    "compile_ahead",
    "depthwise_norm",
    "linear",
    "modulate_",
    "modulate_norm_",
    "norm",
    "operand",
    "project",
]

Rows = tuple[Tensor, Tensor]  # e4m3 (B · N, K) and scales (B · N,)


class Quantised(NamedTuple):
    """A weight as weight8 · scale.  weight8: (out, K) e4m3, scale: (out,) float32"""

    weight8: Tensor
    scale: Tensor


def operand(weight: Tensor | list[Tensor]) -> Quantised:
    """A second copy of the weight, half the size of bf16; several side by side become one."""
    return Quantised(*quantise_weight(weight if isinstance(weight, Tensor) else torch.cat(weight)))


def project(x: Tensor, weight: Quantised, bias: Tensor) -> Tensor:
    """(B, N, C) -> (B, N, C_out)"""
    return _product(x, _quantised(x), weight, bias)


def channelwise_(
    x: Tensor, h: Tensor, expand: Quantised, bias: Tensor, gamma: Tensor, contract: Quantised
) -> None:
    h = project(h, expand, bias)
    if x.is_cuda and resident.fits(h):
        rows = _quantised(resident.gelu_response_norm(h, gamma, waiting_room(x.device)))
    else:
        rows = apply_response_quantise(h, gelu_scale_(h, gamma))
    x.add_(_product(x, rows, contract))


def add_linear_(x: Tensor, h: Tensor, weight: Quantised) -> None:
    x.add_(_product(x, _quantised(h), weight))


def _quantised(x: Tensor) -> Rows:
    return quantise_rows(x.flatten(0, 1))


def _product(x: Tensor, rows: Rows, weight: Quantised, bias: Tensor | None = None) -> Tensor:
    """rows · weight + bias, for the images and in the dtype of x (B, N, …).  -> (B, N, C_out)"""
    out = x.new_empty(*x.shape[:2], len(weight.weight8))
    quantised_linear(*rows, *weight, bias, out.flatten(0, 1))
    return out
