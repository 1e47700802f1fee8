"""What Stage A's residual blocks are made of besides products.

The gammas of a block scale, shift and gate whole feature maps: scalars, read on the device so that nothing waits for
them. Its depthwise convolution, which repeats the border, is `depthwise.depthwise_gate`.
"""

import triton
import triton.language as tl
from torch import Tensor

from .matmul import gelu as gelu_of
from .rows import WARPS, normalised, row_tile

ELEMENTS = 4096  # a program, where rows do not matter


def norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor, eps: float = 1e-6) -> Tensor:
    """out = LayerNorm(x) · (1 + scale) + shift.  x, out: (B, N, C), scale, shift: scalars"""
    batch, n, channels = x.shape
    rows, block = row_tile(channels)
    grid = (triton.cdiv(batch * n, rows),)
    _norm_modulate[grid](x, scale, shift, out, batch * n, eps, channels, rows, block, num_warps=WARPS)
    return out


def gelu(h: Tensor) -> Tensor:
    """h = GELU(h), exact.  h: any contiguous tensor"""
    _gelu[(triton.cdiv(h.numel(), ELEMENTS),)](h, h.numel(), ELEMENTS, num_warps=WARPS)
    return h


def gate_add(x: Tensor, y: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
    """x += gate · (y + bias).  x, y: (B, N, C), bias: (C,), gate: a scalar"""
    batch, n, channels = x.shape
    rows, block = row_tile(channels)
    grid = (triton.cdiv(batch * n, rows),)
    _gate_add[grid](x, y, bias, gate, batch * n, channels, rows, block, num_warps=WARPS)
    return x


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["scale", "shift"])
def _norm_modulate(
    x, scale, shift, out, n, eps, channels: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
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
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(h + place, mask=place < size, other=0.0).to(tl.float32)
    tl.store(h + place, gelu_of(value).to(h.dtype.element_ty), mask=place < size)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["gate"])
def _gate_add(x, y, bias, gate, n, channels: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    present = (row < n) & (c < channels)
    offsets = row.to(tl.int64) * channels + c
    change = tl.load(y + offsets, mask=present, other=0.0).to(tl.float32)
    change += tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)
    value = tl.load(x + offsets, mask=present, other=0.0).to(tl.float32)
    value += tl.load(gate).to(tl.float32) * change
    tl.store(x + offsets, value.to(x.dtype.element_ty), mask=present)
