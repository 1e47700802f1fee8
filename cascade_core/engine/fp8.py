"""`cuda.py` with the blocks' products in e4m3: twice the throughput, for a relative error of a few hundredths.

Weights are the network's own (networks/quantisation.py), with a scale per output channel; feature maps are quantised by
the kernel that computes them, with a scale per row, as they are read by a product. Accumulators are float32, and a
product adds to the residual stream itself. All other operations are those of `cuda.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..networks.quantisation import E4M3, QuantisedWeight
from . import cuda
from .cuda import (
    can_capture,
    compile_ahead,
    fits_registers,
    gelu_response_scale_,
    linear,
    modulate_,
    norm,
    reduction_workspace,
    resample_by_products,
    response_factors,
)
from .kernels import depthwise, modulation, products, resident
from .kernels.fp8 import apply_response_quantise, quantise_rows, quantised_linear
from .operations import EPS
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


class Rows(NamedTuple):
    """A feature map in the form that products read, rows8 · scale.  rows8: (B, N, K) e4m3, scale: (B · N,) float32"""

    rows8: Tensor
    scale: Tensor
    dtype: torch.dtype  # of the results computed from them


formats = (E4M3,)


def depthwise_norm(
    x: Tensor, size: tuple[int, int], weight: Tensor, bias: Tensor, eps: float = EPS, joins: bool = False
) -> Tensor | Rows:
    if joins:
        return cuda.depthwise_norm(x, size, weight, bias, eps)
    rows = _rows_like(x)
    depthwise.depthwise_norm(x, weight, bias, *size, eps, rows.rows8, row_scale=rows.scale)
    return rows


def modulate_norm_(x: Tensor, scale_shift: Tensor, bias: Tensor, eps: float = EPS) -> Rows:
    rows = _rows_like(x)
    modulation.modulate_norm(x, scale_shift, bias, rows.rows8, eps, rows.scale)
    return rows


def project(x: Tensor | Rows, weight: QuantisedWeight | list[QuantisedWeight], bias: Tensor) -> Tensor:
    """One product, or one for each of several weights side by side.  (B, N, C) -> (B, N, C_out)"""
    rows = _quantised(x)
    if isinstance(weight, QuantisedWeight):
        return _product("linear_e4m3", rows, weight, bias)
    out = empty((*rows.rows8.shape[:2], len(bias)), rows.rows8, rows.dtype)
    widths = [len(part.weight8) for part in weight]
    for columns, part, part_bias in zip(out.split(widths, dim=-1), weight, bias.split(widths), strict=True):
        columns.copy_(_product("linear_e4m3", rows, part, part_bias))
    return out


def channelwise_(
    x: Tensor,
    h: Tensor | Rows,
    expand: QuantisedWeight,
    bias: Tensor,
    gamma: Tensor,
    contract: QuantisedWeight,
    h_scale: float = 1.0,
    x_scale: float = 1.0,
) -> None:
    rows = _quantised(h)
    hidden = _expand(rows, expand, bias, gamma, h_scale, x_scale)
    add_linear_(x, hidden, contract)


def _expand(
    rows: Rows, expand: QuantisedWeight, bias: Tensor, gamma: Tensor, h_scale: float, x_scale: float
) -> Rows:
    """The rows of response_norm(GELU(expand · rows + bias))."""
    batch, positions, _ = rows.rows8.shape
    hidden = len(expand.weight8)
    config = _choose("linear_gelu_response_e4m3", rows, expand)
    h = empty((batch, positions, hidden), rows.rows8, rows.dtype)
    out = _rows_like(h)
    if fits_registers(h):
        _product("linear_e4m3", rows, expand, bias, h)
        workspace = reduction_workspace(h.device)
        resident.gelu_response_norm(h, gamma, workspace, h_scale, x_scale, out.rows8, out.scale)
        return out
    if config is None or h_scale != 1:
        _product("linear_e4m3", rows, expand, bias, h)
        factors = gelu_response_scale_(h, gamma, h_scale, x_scale)
    else:
        partial = empty((batch, products.response_chunks(positions, config), hidden), h, torch.float32)
        products.linear_gelu_response(
            rows.rows8.flatten(0, 1), expand.weight8, bias, positions, h.flatten(0, 1), partial, config,
            rows.scale, expand.scale,
        )  # fmt: skip
        factors = response_factors(partial, gamma, x_scale=x_scale)
    apply_response_quantise(h, factors, out.rows8.flatten(0, 1), out.scale)
    return out


def add_linear_(x: Tensor, h: Tensor | Rows, weight: QuantisedWeight) -> None:
    rows = _quantised(h)
    config = _choose("add_linear_e4m3", rows, weight)
    if config is None:
        x.add_(_product("linear_e4m3", rows, weight))
    else:
        operands = rows.rows8.flatten(0, 1), weight.weight8, x.flatten(0, 1)
        products.add_linear(*operands, config, rows.scale, weight.scale)


def attention(
    qkv: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    self_attn: bool,
    x_scale: float = 1.0,
    peak: Tensor | None = None,
) -> Tensor | Rows:
    if peak is None or qkv.shape[-1] // (3 * heads) not in cuda.HEAD_WIDTHS:
        return cuda.attention(qkv, key, value, heads, self_attn, x_scale)
    batch, positions, width = qkv.shape
    shape = batch, positions, width // 3
    rows = Rows(empty(shape, qkv, E4M3), empty((batch * positions,), qkv, torch.float32), qkv.dtype)
    cuda.attend(qkv, key, value, heads, self_attn, rows.rows8, x_scale, rows.scale, peak)
    return rows


def _quantised(x: Tensor | Rows) -> Rows:
    if isinstance(x, Rows):
        return x
    rows = _rows_like(x)
    quantise_rows(x.flatten(0, 1), rows.rows8.flatten(0, 1), rows.scale)
    return rows


def _rows_like(x: Tensor) -> Rows:
    """Uninitialised memory for the quantised rows of x (B, N, K)."""
    return Rows(empty(x.shape, x, E4M3), empty((len(x) * x.shape[1],), x, torch.float32), x.dtype)


def _choose(op: str, rows: Rows, weight: QuantisedWeight) -> products.Config | None:
    n, k = weight.weight8.shape
    return products.choose(op, len(rows.scale), n, k, rows.rows8.device)


def _product(
    op: str, rows: Rows, weight: QuantisedWeight, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """rows · weight + bias: (B, N, C) -> (B, N, C_out)"""
    if out is None:
        out = empty((*rows.rows8.shape[:2], len(weight.weight8)), rows.rows8, rows.dtype)
    config = _choose(op, rows, weight)
    quantised_linear(rows.rows8.flatten(0, 1), rows.scale, *weight, bias, out.flatten(0, 1), config)
    return out
