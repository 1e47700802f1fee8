"""3×3 depthwise convolution over tokens, with what follows it in a residual block.

A program convolves a small rectangle of positions, so that most of its nine taps hit the L1 cache.
"""

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
    whole_rows,
    widened,
)


def depthwise_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    height: int,
    width: int,
    eps: float,
    out: Tensor,
    tile: RowTile | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """out = LayerNorm over C of (the convolution of x with zero padding, + bias).

    x, out: (B, height · width, C), weight: (9, C) taps from top left to bottom right, bias: (C,)
    row_scale (B · height · width,) float32: takes the scales of the rows where `out` is in e4m3
    """
    batch, _, channels = x.shape
    tile = tile or norm_tile(channels)
    tile_h, tile_w = rectangle(tile.rows)
    grid = (triton.cdiv(height, tile_h) * triton.cdiv(width, tile_w), batch)
    launch(_depthwise_norm, grid)(
        x, weight, bias, out, row_scale, height, width, eps,
        channels, tile.parts, tile.width, tile_h, tile_w, triton.knobs.runtime.interpret,
        scale_of_normed_rows(channels), num_warps=tile.warps,
    )  # fmt: skip
    return out


def norm_tile(channels: int) -> RowTile:
    """The tile of `depthwise_norm`: a thread has eight channels of each part, of two positions or one.

    A row that fills its tile stays whole: parts of 2048 channels took 12 to 30 % longer on an H200.
    """
    parts, width = row_parts(channels, 2 * WARP_CHANNELS)
    if parts == 1 or fills_a_tile(channels):
        return whole_rows(channels)
    positions = max(1, WARPS * WARP_CHANNELS // width)
    return RowTile(2 * positions if parts <= 5 else positions, parts, width, WARPS)


def depthwise_gate_norm(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate: Tensor,
    x: Tensor,
    next_bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    top: int,
    height: int,
    width: int,
    eps: float,
    elements: int | None = None,
    num_warps: int | None = None,
) -> Tensor:
    """x += gate · (the convolution of h with its border repeated, + bias); out = LayerNorm(x) · (1 + scale) + shift;
    x += next_bias, the bias of the product that will be added to x. x holds the image's lines from `top` on.

    h: (height · width, C), x, out: (lines · width, C), weight: (9, C), bias, next_bias: (C,), gate, scale, shift:
    scalars on the device
    """
    positions, channels = x.shape
    tuned_elements, tuned_warps = gate_norm_tile(channels)
    elements, num_warps = elements or tuned_elements, num_warps or tuned_warps
    lines, block = positions // width, triton.next_power_of_2(channels)
    tile_h, tile_w = rectangle(max(1, elements // block))
    grid = (triton.cdiv(lines, tile_h) * triton.cdiv(width, tile_w),)
    launch(_depthwise_gate_norm, grid)(
        h, weight, bias, gate, x, next_bias, scale, shift, out, top, lines, height, width, eps,
        channels, block, tile_h, tile_w, num_warps=num_warps,
    )  # fmt: skip
    return out


def gate_norm_tile(channels: int) -> tuple[int, int]:
    """(elements, warps) of a tile of `depthwise_gate_norm`: the fastest on an H200 at the widths of Stage A."""
    return (2048, 2) if channels > 256 else (8192, 16)


def rectangle(positions: int) -> tuple[int, int]:
    """(height, width) nearest to a square.  positions: a power of two"""
    height = 1 << (positions.bit_length() - 1) // 2
    return height, positions // height


@triton.jit
def tile_positions(height, width, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """y and x of the positions of the program's rectangle: (TILE_H · TILE_W, 1) each, some beyond the image."""
    tiles = tl.cdiv(width, TILE_W)
    position = tl.arange(0, TILE_H * TILE_W)[:, None]
    y = tl.program_id(0) // tiles * TILE_H + position // TILE_W
    x = tl.program_id(0) % tiles * TILE_W + position % TILE_W
    return y, x


@triton.jit
def convolved(
    image, weight, bias, y, x, c, height, width, channels: tl.constexpr, REPEAT_BORDER: tl.constexpr
):
    """The convolution at (y, x) for channels c.  y, x: (P, 1), c: (1, BLOCK) -> (P, BLOCK) float32"""
    inside = c < channels
    total = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32) + tl.zeros_like(y).to(tl.float32)
    for up in tl.range(3, loop_unroll_factor=1):
        # Unrolled, all 9 loads would be in flight at once and take 200 registers a thread.
        row = y + (up - 1)
        for left in tl.static_range(3):
            column = x + (left - 1)
            if REPEAT_BORDER:
                near_row = tl.minimum(tl.maximum(row, 0), height - 1)
                near_column = tl.minimum(tl.maximum(column, 0), width - 1)
                offsets = (near_row * width + near_column).to(tl.int64) * channels + c
                value = tl.load(image + offsets, mask=inside, other=0.0).to(tl.float32)
            else:
                present = (row >= 0) & (row < height) & (column >= 0) & (column < width)
                offsets = (row * width + column).to(tl.int64) * channels + c
                value = tl.load(image + offsets, mask=present & inside, other=0.0).to(tl.float32)
            tap = tl.load(weight + (3 * up + left) * channels + c, mask=inside, other=0.0)
            total += value * tap.to(tl.float32)
    return total


@triton.jit
def convolved_parts(
    image, weight, bias, y, x, height, width,
    channels: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The convolution at (y, x), with zeros around the image.  y, x: (P, 1) -> a tuple of (P, WIDTH) float32"""
    here = tl.zeros_like(y)
    total = ()
    for part in tl.static_range(PARTS):
        c = channels_of(part, WIDTH)
        first = tl.load(bias + (c + here))
        total = total + (widened(first, INTERPRETED),)  # noqa: RUF005
    for tap in tl.range(9, loop_unroll_factor=1):
        row, column = y + (tap // 3 - 1), x + (tap % 3 - 1)
        present = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        position = image + (row * width + column).to(tl.int64) * channels
        sums = ()
        for part in tl.static_range(PARTS):
            c = channels_of(part, WIDTH)
            # Of all positions' shape, so that each thread loads the taps of its own channels.
            tap_at = weight + tap * channels + (c + here)
            value = tl.load(position + c, mask=present, other=0.0)
            scale = tl.load(tap_at)
            sums = sums + (total[part] + widened(value, INTERPRETED) * widened(scale, INTERPRETED),)  # noqa: RUF005
        total = sums
    return total


@triton.jit(do_not_specialize=["height", "width"])
def _depthwise_norm(
    x,
    weight,
    bias,
    out,
    row_scale,
    height,
    width,
    eps,
    channels: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    INTERPRETED: tl.constexpr,
    SCALE: tl.constexpr,
):
    first = tl.program_id(1) * height * width
    start = first.to(tl.int64) * channels
    c = tl.arange(0, WIDTH)[None, :]
    row, column = tile_positions(height, width, TILE_H, TILE_W)
    if PARTS == 1:
        h = convolved(x + start, weight, bias, row, column, c, height, width, channels, False)
        h = normalised(h, c < channels, channels, eps)
        offsets = (row * width + column).to(tl.int64) * channels + c
        present = (row < height) & (column < width)
        position = first + row * width + column
        store_rows(out + start, row_scale, h, offsets, present & (c < channels), position, present)
    else:
        parts = convolved_parts(
            x + start, weight, bias, row, column, height, width, channels, PARTS, WIDTH, INTERPRETED
        )
        normal = normalised_parts(parts, channels, eps, TILE_H * TILE_W, PARTS, WIDTH)
        offsets = (row * width + column).to(tl.int64) * channels
        present = (row < height) & (column < width)
        position = first + row * width + column
        store_parts(out + start, row_scale, normal, offsets, present, position, PARTS, WIDTH, SCALE)


@triton.jit(
    do_not_specialize=["top", "lines", "height", "width"],
    do_not_specialize_on_alignment=["gate", "scale", "shift"],
)
def _depthwise_gate_norm(
    h,
    weight,
    bias,
    gate,
    x,
    next_bias,
    scale,
    shift,
    out,
    top,
    lines,
    height,
    width,
    eps,
    channels: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
):
    c = tl.arange(0, BLOCK)[None, :]
    row, column = tile_positions(lines, width, TILE_H, TILE_W)
    change = convolved(h, weight, bias, top + row, column, c, height, width, channels, True)
    offsets = (row * width + column).to(tl.int64) * channels + c
    present = (row < lines) & (column < width) & (c < channels)
    value = tl.load(x + offsets, mask=present, other=0.0).to(tl.float32)
    value += tl.load(gate).to(tl.float32) * change
    normal = normalised(value, c < channels, channels, eps)
    normal = normal * (1.0 + tl.load(scale).to(tl.float32)) + tl.load(shift).to(tl.float32)
    tl.store(out + offsets, normal.to(out.dtype.element_ty), mask=present)
    value += tl.load(next_bias + c, mask=c < channels, other=0.0).to(tl.float32)
    tl.store(x + offsets, value.to(x.dtype.element_ty), mask=present)
