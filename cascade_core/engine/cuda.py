"""The operations of `operations.py` as fused kernels, for CUDA."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from . import operations
from .card import card_of
from .graphs import can_capture
from .kernels import attention as attention_kernel
from .kernels import depthwise, modulation, products, resident, response
from .kernels.launch import compile_ahead
from .operations import EPS, formats
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

resample_by_products = True

HEAD_WIDTHS = (16, 32, 64, 128)  # supported by the attention kernel
MAX_BATCH, MAX_HIDDEN = 64, 8192  # largest sizes of a feature map that fits the device's registers
LONG_SEQUENCE = 512  # positions from which HOPPER_ATTENTION is faster
# With 96 registers a multiprocessor runs five programs instead of four.
HOPPER_ATTENTION = {
    "num_stages": 2,
    "tma": True,
    "registers": 96,
}


def norm(x: Tensor, eps: float = EPS) -> Tensor:
    return modulation.norm(x, empty(x.shape, x), eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, N, C) -> (B, N, C_out)"""
    return _linear_out(x, weight, bias, empty((*x.shape[:-1], len(weight)), x))


def _linear_out(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    rows, columns = x.flatten(0, 1), weight.T
    config = measured("linear", x, weight) if out.is_contiguous() else None
    if config is not None:
        products.linear(rows, weight, bias, out.flatten(0, 1), config)
    elif bias is None:
        torch.mm(rows, columns, out=out.flatten(0, 1))
    else:
        torch.addmm(bias, rows, columns, out=out.flatten(0, 1))
    return out


def project(x: Tensor, weight: Tensor | list[Tensor], bias: Tensor) -> Tensor:
    """One product, or one for each of several weights side by side.  (B, N, C) -> (B, N, C_out)"""
    if isinstance(weight, Tensor):
        return linear(x, weight, bias)
    out = empty((*x.shape[:-1], len(bias)), x)
    widths = [len(rows) for rows in weight]
    for part, rows, part_bias in zip(out.split(widths, dim=-1), weight, bias.split(widths), strict=True):
        _linear_out(x, rows, part_bias, part)
    return out


def depthwise_norm(
    x: Tensor, size: tuple[int, int], weight: Tensor, bias: Tensor, eps: float = EPS, joins: bool = False
) -> Tensor:
    return depthwise.depthwise_norm(x, weight, bias, *size, eps, empty(x.shape, x))


def channelwise_(
    x: Tensor,
    h: Tensor,
    expand: Tensor,
    bias: Tensor,
    gamma: Tensor,
    contract: Tensor,
    h_scale: float = 1.0,
    x_scale: float = 1.0,
) -> None:
    add_linear_(x, expanded(h, expand, bias, gamma, h_scale, x_scale), contract)


def expanded(
    h: Tensor, expand: Tensor, bias: Tensor, gamma: Tensor, h_scale: float = 1.0, x_scale: float = 1.0
) -> Tensor:
    """The first half of `channelwise_`: response_norm(GELU(expand · h + bias))."""
    batch, positions, _ = h.shape
    hidden, width = expand.shape
    config = products.choose("linear_gelu_response", batch * positions, hidden, width, h.device)
    if config is None or h_scale != 1:
        return respond_(linear(h, expand, bias), gamma, h_scale, x_scale)
    partial = empty((batch, products.response_chunks(positions, config), hidden), h, torch.float32)
    out = empty((batch, positions, hidden), h)
    products.linear_gelu_response(
        h.flatten(0, 1), expand, bias, positions, out.flatten(0, 1), partial, config
    )
    return response.apply_response(out, response_factors(partial, gamma, x_scale=x_scale))


def respond_(h: Tensor, gamma: Tensor, h_scale: float = 1.0, x_scale: float = 1.0) -> Tensor:
    """h = response_norm(GELU(h)).  h: (B, N, K), gamma: (K,)"""
    if fits_registers(h):
        return gelu_response_norm_(h, gamma, h_scale, x_scale)
    return response.apply_response(h, gelu_response_scale_(h, gamma, h_scale, x_scale))


def add_linear_(x: Tensor, h: Tensor, weight: Tensor) -> None:
    config = measured("add_linear", h, weight)
    if config is None:
        operations.add_linear_(x, h, weight)
    else:
        products.add_linear(h.flatten(0, 1), weight, x.flatten(0, 1), config)


def measured(op: str, x: Tensor, weight: Tensor) -> products.Config | None:
    """The Config with which our product of x (B, N, K) and weight (out, K) is faster than cuBLAS's, or None."""
    if x.element_size() != 2 or not weight.is_contiguous():
        return None
    n, k = weight.shape
    return products.choose(op, len(x) * x.shape[1], n, k, x.device)


def fits_registers(h: Tensor) -> bool:
    """Whether `gelu_response_norm_` takes h (B, N, K)."""
    return card_of(h.device) is not None and resident.fits(h)


def gelu_response_norm_(h: Tensor, gamma: Tensor, h_scale: float = 1.0, x_scale: float = 1.0) -> Tensor:
    """h = response_norm(GELU(h)) in one launch.  h: (B, N, K), gamma: (K,)"""
    return resident.gelu_response_norm(h, gamma, reduction_workspace(h.device), h_scale, x_scale)


def gelu_response_scale_(h: Tensor, gamma: Tensor, h_scale: float = 1.0, x_scale: float = 1.0) -> Tensor:
    """h = GELU(h); returns the factors of its response norm.  h: (B, N, K), gamma: (K,) -> (B, K) float32"""
    batch, positions, hidden = h.shape
    chunks = response.response_chunks(positions, hidden)
    partial = empty((batch, chunks, hidden), h, torch.float32)
    response.gelu_response(h, partial, h_scale)
    return response_factors(partial, gamma, h_scale, x_scale)


def response_factors(partial: Tensor, gamma: Tensor, h_scale: float = 1.0, x_scale: float = 1.0) -> Tensor:
    """The factors (B, K) of the response norm, from partial sums of squares (B, chunks, K)."""
    batch, _, hidden = partial.shape
    return response.response_scale(partial, gamma, empty((batch, hidden), partial), h_scale, x_scale)


@cache
def reduction_workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """Per-device workspace for the grid-wide reduction of `resident.gelu_response_norm`."""
    return resident.response_workspace(MAX_BATCH, MAX_HIDDEN, device)


def modulate_(x: Tensor, scale_shift: Tensor) -> None:
    modulation.modulate(x, scale_shift)


def modulate_norm_(x: Tensor, scale_shift: Tensor, bias: Tensor, eps: float = EPS) -> Tensor:
    return modulation.modulate_norm(x, scale_shift, bias, empty(x.shape, x), eps)


def attention(
    qkv: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    self_attn: bool,
    x_scale: float = 1.0,
    peak: Tensor | None = None,
) -> Tensor:
    batch, positions, width = qkv.shape
    channels = width // 3
    head_width = channels // heads
    if head_width not in HEAD_WIDTHS:
        return operations.attention(qkv, key, value, heads, self_attn, x_scale)
    out = empty((batch, positions, channels), qkv)
    return attend(qkv, key, value, heads, self_attn, out, x_scale)


def attend(
    qkv: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    self_attn: bool,
    out: Tensor,
    x_scale: float = 1.0,
    row_scale: Tensor | None = None,
    peak: Tensor | None = None,
) -> Tensor:
    """Attention in `out` (B, N, C), with the scales of its rows in row_scale (B · N,) where it is in e4m3."""
    positions, head_width = qkv.shape[1], out.shape[-1] // heads
    card = card_of(qkv.device)
    hopper = positions >= LONG_SEQUENCE and head_width == 64 and card is not None and card.capability[0] == 9
    options = HOPPER_ATTENTION if hopper else {}
    return attention_kernel.attention(
        qkv, key, value, heads, out, self_attn, x_scale=x_scale, row_scale=row_scale, peak=peak, **options
    )
