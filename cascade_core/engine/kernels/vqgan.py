"""Kernels of Stage A's residual blocks, beside the products.

The gammas of a block scale, shift and gate whole feature maps: scalars, read on the device to avoid synchronisation.
The depthwise convolution with replicated border is `depthwise.depthwise_gate_norm`.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .matmul import gelu as gelu_of
from .rows import WARPS, normalised, row_tile

ELEMENTS = 4096  # per program of element-wise kernels


def norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor, eps: float = 1e-6) -> Tensor:
    """out = LayerNorm(x) · (1 + scale) + shift.  x, out: (…, C) contiguous, scale, shift: scalars"""
    channels = x.shape[-1]
    n = x.numel() // channels
    rows, block = row_tile(channels)
    grid = (triton.cdiv(n, rows),)
    launch(_norm_modulate, grid)(x, scale, shift, out, n, eps, channels, rows, block, num_warps=WARPS)
    return out


def gelu(h: Tensor) -> Tensor:
    """h = GELU(h), exact.  h: any contiguous tensor"""
    grid = (triton.cdiv(h.numel(), ELEMENTS),)
    launch(_gelu, grid)(h, h.numel(), ELEMENTS, num_warps=WARPS)
    return h


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["scale", "shift"])
def _norm_modulate(
    x,
    scale,
    shift,
    out,
    n,
    eps,
    channels: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    present = (row < n) & (c < channels)
    offsets = row.to(tl.int64) * channels + c
    h = normalised(tl.load(x + offsets, mask=present, other=0.0).to(tl.float32), c < channels, channels, eps)
    h = h * (1.0 + tl.load(scale).to(tl.float32)) + tl.load(shift).to(tl.float32)
    tl.store(out + offsets, h.to(out.dtype.element_ty), mask=present)


@triton.jit
def _gelu(h, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(h + offsets, mask=offsets < size, other=0.0).to(tl.float32)
    tl.store(h + offsets, gelu_of(value).to(h.dtype.element_ty), mask=offsets < size)
