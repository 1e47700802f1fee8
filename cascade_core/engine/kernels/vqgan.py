"""What Stage A's residual blocks are made of besides products.

The gammas of a block scale, shift and gate whole feature maps: scalars, read on the device so that nothing waits for
them. Its depthwise convolution, which repeats the border, is `depthwise.depthwise_gate_norm`.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import early, wait_for_previous
from .matmul import SCHEDULES, product
from .matmul import gelu as gelu_of
from .products import _described, _schedule
from .rows import WARPS, normalised, row_tile
from .tuned import Config

ELEMENTS = 4096  # a program, where rows do not matter
PARTS = 3  # of the channels in `mlp_add`: 384 and 192 are no powers of two, which tiles have to be


def norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor, eps: float = 1e-6) -> Tensor:
    """out = LayerNorm(x) · (1 + scale) + shift.  x, out: (…, C) contiguous, scale, shift: scalars"""
    channels = x.shape[-1]
    n = x.numel() // channels
    rows, block = row_tile(channels)
    grid = (triton.cdiv(n, rows),)
    _norm_modulate[grid](
        x, scale, shift, out, n, eps, channels, rows, block, num_warps=WARPS, **early(x.device)
    )
    return out


def gelu(h: Tensor) -> Tensor:
    """h = GELU(h), exact.  h: any contiguous tensor"""
    grid = (triton.cdiv(h.numel(), ELEMENTS),)
    _gelu[grid](h, h.numel(), ELEMENTS, num_warps=WARPS, **early(h.device))
    return h


def linear_gelu(x: Tensor, w: Tensor, bias: Tensor, out: Tensor, config: Config) -> Tensor:
    """out = GELU(x wᵀ + bias).  x: (M, C), w: (hidden, C), bias: (hidden,), out: (M, hidden)"""
    (m, k), n = x.shape, len(w)
    tiles_m, tiles_n = triton.cdiv(m, config.block_m), triton.cdiv(n, config.block_n)
    programs, streamed, parts, counters = _schedule(config, tiles_m * tiles_n, x.device)
    tma = config.tma and k * x.element_size() % 16 == 0
    launch: Any = product[(programs,)]
    launch(
        _described(x, config.block_m, config.block_k) if tma else x,
        _described(w, config.block_n, config.block_k) if tma else w,
        None, None, None, bias, out, None, parts, counters,
        m, n, k, m, m, 0, tiles_m, tiles_n, streamed, programs,
        SPANS=0, GELU=True, RESPONSE=False, ADD=False, PADDED=False,
        EVEN_K=k % config.block_k == 0, PRECISION="ieee", SCHEDULE=SCHEDULES[config.schedule], TMA=tma,
        CHUNK=config.block_m, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        GROUP=config.group, num_warps=config.warps, num_stages=config.stages, **early(x.device),
    )  # fmt: skip
    return out


def mlp_add(
    h: Tensor, expand: Tensor, expand_bias: Tensor, contract: Tensor, x: Tensor, config: Config
) -> Tensor:
    """x += GELU(h · expandᵀ + expand_bias) · contractᵀ, with nothing of the hidden map in memory.

    Hidden values are rounded to h's dtype, as if they had been stored. A program has config.block_m rows and goes
    through the hidden channels config.block_n at a time.

    h, x: (M, C), C three times a power of two; expand: (hidden, C), hidden a multiple of block_n; contract: (C, hidden)
    """
    m, channels = h.shape
    hidden, part = len(expand), channels // PARTS
    launch: Any = _mlp_add[(triton.cdiv(m, config.block_m),)]
    launch(
        h,
        _described(expand, config.block_n, part) if config.tma else expand,
        expand_bias,
        _described(contract, part, config.block_n) if config.tma else contract,
        x, m, hidden, part, config.block_m, config.block_n, config.tma, "ieee",
        num_warps=config.warps, num_stages=config.stages, **early(x.device),
    )  # fmt: skip
    return x


def gate_add(x: Tensor, y: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
    """x += gate · (y + bias).  x, y: (B, N, C), bias: (C,), gate: a scalar"""
    batch, n, channels = x.shape
    rows, block = row_tile(channels)
    grid = (triton.cdiv(batch * n, rows),)
    _gate_add[grid](x, y, bias, gate, batch * n, channels, rows, block, num_warps=WARPS)
    return x


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
    EARLY: tl.constexpr,
):
    wait_for_previous(EARLY)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    present = (row < n) & (c < channels)
    offsets = row.to(tl.int64) * channels + c
    h = normalised(tl.load(x + offsets, mask=present, other=0.0).to(tl.float32), c < channels, channels, eps)
    h = h * (1.0 + tl.load(scale).to(tl.float32)) + tl.load(shift).to(tl.float32)
    tl.store(out + offsets, h.to(out.dtype.element_ty), mask=present)


@triton.jit
def _gelu(h, size, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    wait_for_previous(EARLY)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(h + place, mask=place < size, other=0.0).to(tl.float32)
    tl.store(h + place, gelu_of(value).to(h.dtype.element_ty), mask=place < size)


@triton.jit(do_not_specialize=["m"])
def _mlp_add(
    h, expand, bias, contract, x, m,
    hidden: tl.constexpr, PART: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """expand and contract: the weights, or their descriptors"""
    wait_for_previous(EARLY)
    C: tl.constexpr = 3 * PART
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offsets = tl.minimum(row, m - 1).to(tl.int64)[:, None] * C + tl.arange(0, PART)[None, :]
    h0 = tl.load(h + offsets)  # (BLOCK_M, PART)
    h1 = tl.load(h + offsets + PART)
    h2 = tl.load(h + offsets + 2 * PART)
    sum0 = tl.zeros((BLOCK_M, PART), tl.float32)
    sum1 = tl.zeros((BLOCK_M, PART), tl.float32)
    sum2 = tl.zeros((BLOCK_M, PART), tl.float32)
    channel, unit = tl.arange(0, PART), tl.arange(0, BLOCK_H)
    for first in range(0, hidden, BLOCK_H):
        if TMA:
            up0 = expand.load([first, 0]).T
            up1 = expand.load([first, PART]).T
            up2 = expand.load([first, 2 * PART]).T
            down0 = contract.load([0, first]).T
            down1 = contract.load([PART, first]).T
            down2 = contract.load([2 * PART, first]).T
        else:
            up = expand + (first + unit)[None, :] * C + channel[:, None]  # (PART, BLOCK_H)
            up0 = tl.load(up)
            up1 = tl.load(up + PART)
            up2 = tl.load(up + 2 * PART)
            down = contract + channel[None, :] * hidden + (first + unit)[:, None]  # (BLOCK_H, PART)
            down0 = tl.load(down)
            down1 = tl.load(down + PART * hidden)
            down2 = tl.load(down + 2 * PART * hidden)
        value = tl.dot(h0, up0, input_precision=PRECISION)
        value = tl.dot(h1, up1, value, input_precision=PRECISION)
        value = tl.dot(h2, up2, value, input_precision=PRECISION)
        value += tl.load(bias + first + unit).to(tl.float32)[None, :]
        value = gelu_of(value).to(h0.dtype)
        sum0 = tl.dot(value, down0, sum0, input_precision=PRECISION)
        sum1 = tl.dot(value, down1, sum1, input_precision=PRECISION)
        sum2 = tl.dot(value, down2, sum2, input_precision=PRECISION)
    at = x + offsets
    valid = (row < m)[:, None]
    sum0 += tl.load(at).to(tl.float32)
    tl.store(at, sum0.to(x.dtype.element_ty), mask=valid)
    sum1 += tl.load(at + PART).to(tl.float32)
    tl.store(at + PART, sum1.to(x.dtype.element_ty), mask=valid)
    sum2 += tl.load(at + 2 * PART).to(tl.float32)
    tl.store(at + 2 * PART, sum2.to(x.dtype.element_ty), mask=valid)


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
