"""`cuda.py` with the blocks' weights in int8, with a scale per output channel: half the memory of 16 bits.

Weights are converted to the precision of the feature map, so the error of about a hundredth comes from the weights
alone. A product converts them as it loads them where that was measured to be faster (`tuned.json`); else they are
written in 16 bits to the workspace, mostly to the card's L2 cache, and cuBLAS multiplies them there.
"""

from __future__ import annotations

from torch import Tensor

from ..networks.quantisation import INT8, QuantisedWeight
from . import cuda
from .cuda import (
    attention,
    can_capture,
    compile_ahead,
    depthwise_norm,
    linear,
    modulate_,
    modulate_norm_,
    norm,
    resample_by_products,
)
from .kernels import products
from .kernels.int8 import dequantise
from .workspace import empty

__all__ = [
    "add_linear_",
    "attention",
    "can_capture",
    "channelwise_",
    "compile_ahead",
    "depthwise_norm",
    "formats",
    "linear",
    "modulate_",
    "modulate_norm_",
    "norm",
    "project",
    "resample_by_products",
]


formats = (INT8,)


def project(x: Tensor, weight: QuantisedWeight | list[QuantisedWeight], bias: Tensor) -> Tensor:
    """One product, or one for each of several weights side by side.  (B, N, C) -> (B, N, C_out)"""
    if not isinstance(weight, QuantisedWeight):
        return cuda.project(x, [_in_16_bits(part, x) for part in weight], bias)
    config = _choose("linear_int8", x, weight)
    if config is None:
        return cuda.linear(x, _in_16_bits(weight, x), bias)
    out = empty((*x.shape[:-1], len(weight.weight8)), x)
    weight8, scale = weight
    products.linear(x.flatten(0, 1), weight8, bias, out.flatten(0, 1), config, column_scale=scale)
    return out


def channelwise_(
    x: Tensor,
    h: Tensor,
    expand: QuantisedWeight,
    bias: Tensor,
    gamma: Tensor,
    contract: QuantisedWeight,
    h_scale: float = 1.0,
    x_scale: float = 1.0,
) -> None:
    if _choose("linear_int8", h, expand) is None:
        h = cuda.expanded(h, _in_16_bits(expand, h), bias, gamma, h_scale, x_scale)
    else:
        h = cuda.respond_(project(h, expand, bias), gamma, h_scale, x_scale)
    add_linear_(x, h, contract)


def add_linear_(x: Tensor, h: Tensor, weight: QuantisedWeight) -> None:
    config = _choose("add_linear_int8", h, weight)
    if config is None:
        cuda.add_linear_(x, h, _in_16_bits(weight, h))
    else:
        weight8, scale = weight
        products.add_linear(h.flatten(0, 1), weight8, x.flatten(0, 1), config, column_scale=scale)


def _choose(op: str, x: Tensor, weight: QuantisedWeight) -> products.Config | None:
    n, k = weight.weight8.shape
    return products.choose(op, len(x) * x.shape[1], n, k, x.device)


def _in_16_bits(weight: QuantisedWeight, like: Tensor) -> Tensor:
    return dequantise(*weight, empty(weight.weight8.shape, like))
