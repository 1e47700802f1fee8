"""Scale and shift of every channel by the noise condition, and the LayerNorm that follows."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .quantise import scale_of_normed_rows, store_parts, store_rows
from .rows import (
    WARP_CHANNELS,
    WARPS,
    RowTile,
    channels_of,
    fills_a_tile,
    normalised,
    normalised_parts,
    row_parts,
    row_tile,
    whole_rows,
    widened,
)

PART_ELEMENTS = 1024  # of each part of a tile: eight for a thread of four warps


def modulate(x: Tensor, scale_shift: Tensor) -> Tensor:
    """x = x · (1 + scale) + shift.  x: (B, N, C), scale_shift: (2C,), scales first"""
    batch, n, channels = x.shape
    rows, block = row_tile(channels)
    grid = (triton.cdiv(n, rows), batch)
    launch(_modulate, grid)(x, scale_shift, n, channels, rows, block, num_warps=WARPS)
    return x


def modulate_norm(
    x: Tensor,
    scale_shift: Tensor,
    bias: Tensor | None,
    out: Tensor,
    eps: float,
    row_scale: Tensor | None = None,
    tile: RowTile | None = None,
) -> Tensor:
    """x' = x · (1 + scale) + shift; out = LayerNorm(x'); x = x' + bias.

    x, out: (B, N, C), scale_shift: (2C,), scales first, bias: (C,)
    row_scale (B · N,) float32: takes the scales of the rows where `out` is in e4m3
    """
    batch, n, channels = x.shape
    tile = tile or norm_tile(channels, row_scale is not None)
    grid = (triton.cdiv(n, tile.rows), batch)
    launch(_modulate_norm, grid)(
        x, scale_shift, bias, out, row_scale, n, eps,
        channels, tile.rows, tile.parts, tile.width, triton.knobs.runtime.interpret,
        scale_of_normed_rows(channels), num_warps=tile.warps,
    )  # fmt: skip
    return out


def norm_tile(channels: int, in_e4m3: bool) -> RowTile:
    """The tile of `modulate_norm`.

    A row that fills its tile stays whole: parts of 2048 channels took 28 % longer on an H200. Not in e4m3, where parts
    need no pass for a row's largest value: they took 15 % less.
    """
    parts, width = row_parts(channels, WARP_CHANNELS)
    if parts == 1 or (fills_a_tile(channels) and not in_e4m3):
        return whole_rows(channels)
    return RowTile(max(1, PART_ELEMENTS // width), parts, width, WARPS)


def norm(x: Tensor, out: Tensor, eps: float) -> Tensor:
    """out = LayerNorm(x), without weights.  x, out: (B, N, C)"""
    batch, n, channels = x.shape
    rows, block = row_tile(channels)
    grid = (triton.cdiv(batch * n, rows),)
    launch(_norm, grid)(x, out, batch * n, eps, channels, rows, block, num_warps=WARPS)
    return out


@triton.jit
def modulated(x, scale_shift, c, inside, channels: tl.constexpr):
    """x · (1 + scale) + shift.  x: (ROWS, BLOCK) float32 -> same; scale_shift points to (2C,)"""
    scale = tl.load(scale_shift + c, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(scale_shift + channels + c, mask=inside, other=0.0).to(tl.float32)
    return x * (1.0 + scale) + shift


@triton.jit(do_not_specialize=["n"])
def _modulate(
    x,
    scale_shift,
    n,
    channels: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    inside = c < channels
    present = (row < n) & inside
    pointers = x + (image.to(tl.int64) * n + row) * channels + c
    value = tl.load(pointers, mask=present, other=0.0).to(tl.float32)
    value = modulated(value, scale_shift, c, inside, channels)
    tl.store(pointers, value.to(x.dtype.element_ty), mask=present)


@triton.jit(do_not_specialize=["n"])
def _modulate_norm(
    x,
    scale_shift,
    bias,
    out,
    row_scale,
    n,
    eps,
    channels: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
    SCALE: tl.constexpr,
):
    image = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    if PARTS == 1:
        c = tl.arange(0, WIDTH)[None, :]
        inside = c < channels
        present = (row < n) & inside
        offsets = (image.to(tl.int64) * n + row) * channels + c
        value = tl.load(x + offsets, mask=present, other=0.0).to(tl.float32)
        value = modulated(value, scale_shift, c, inside, channels)
        h = normalised(value, inside, channels, eps)
        store_rows(out, row_scale, h, offsets, present, image * n + row, row < n)
        if bias is not None:
            value += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
        tl.store(x + offsets, value.to(x.dtype.element_ty), mask=present)
    else:
        offsets = (image.to(tl.int64) * n + row) * channels
        here = tl.zeros_like(row)
        parts = ()
        for part in tl.static_range(PARTS):
            c = channels_of(part, WIDTH)
            pointers = tl.max_contiguous(x + (offsets + c), (1, 8))
            value = widened(tl.load(pointers, mask=row < n, other=0.0), INTERPRETED)
            parts = parts + (modulated(value, scale_shift, c + here, c < channels, channels),)  # noqa: RUF005
        normal = normalised_parts(parts, channels, eps, ROWS, PARTS, WIDTH)
        store_parts(out, row_scale, normal, offsets, row < n, image * n + row, PARTS, WIDTH, SCALE)
        for part in tl.static_range(PARTS):
            c = channels_of(part, WIDTH)
            biased = parts[part]
            if bias is not None:
                biased += tl.load(bias + (c + here)).to(tl.float32)
            pointers = tl.max_contiguous(x + (offsets + c), (1, 8))
            tl.store(pointers, tl.cast(biased, x.dtype.element_ty), mask=row < n)


@triton.jit(do_not_specialize=["n"])
def _norm(
    x,
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
    value = tl.load(x + offsets, mask=present, other=0.0).to(tl.float32)
    tl.store(
        out + offsets, normalised(value, c < channels, channels, eps).to(out.dtype.element_ty), mask=present
    )
