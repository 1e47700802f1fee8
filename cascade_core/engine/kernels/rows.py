"""Tiles of whole rows of (B, N, C), and LayerNorm over them."""

from typing import NamedTuple

import triton
import triton.language as tl

ELEMENTS = 2048  # of a tile: 16 float32 registers per thread of four warps; measured on an H100
WARPS = 4
WARP_CHANNELS = 256  # that a warp loads at once, eight a thread: a row's sums then stay within the warp
MAX_PARTS = 9


class RowTile(NamedTuple):
    """The rows that a program computes: `rows` of them in `parts` of `width` channels each, by `warps` warps.

    Tiles of Triton are powers of two wide. Five parts of 256 channels hold 1280; one tile would hold 2048, and three
    eighths of its arithmetic would be of no use. One part may be wider than the channels; several parts are just as
    wide. In e4m3 a row of one part has a scale of its own, and a row of several parts that of the longest there can be.
    """

    rows: int
    parts: int
    width: int
    warps: int


def row_tile(channels: int, elements: int = ELEMENTS) -> tuple[int, int]:
    """(rows, channels rounded up to a power of two) of a tile of about `elements` elements."""
    block = triton.next_power_of_2(channels)
    return max(1, elements // block), block


def whole_rows(channels: int) -> RowTile:
    rows, block = row_tile(channels)
    return RowTile(rows, 1, block, WARPS)


def fills_a_tile(channels: int) -> bool:
    return channels == triton.next_power_of_2(channels)


def row_parts(channels: int, widest: int) -> tuple[int, int]:
    """(parts, width) into which channels divide without a rest; one part, rounded up, where they would be many."""
    width = min(channels & -channels, widest)
    parts = channels // width
    return (parts, width) if parts <= MAX_PARTS else (1, triton.next_power_of_2(channels))


@triton.jit
def normalised(x, inside, channels: tl.constexpr, eps):
    """LayerNorm of every row.  x: (ROWS, BLOCK) float32, zero where not `inside` (1, BLOCK) -> same"""
    mean = tl.sum(x, axis=1, keep_dims=True) / channels
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(centred * centred, axis=1, keep_dims=True) / channels
    return centred * tl.rsqrt(variance + eps)


@triton.jit
def channels_of(PART: tl.constexpr, WIDTH: tl.constexpr):
    """The channels of a part: (1, WIDTH), for a thread eight at most, whatever the type of what is stored."""
    return tl.max_contiguous(PART * WIDTH + tl.arange(0, WIDTH)[None, :], (1, 8))


@triton.jit
def widened(x, INTERPRETED: tl.constexpr):
    """x in float32: bfloat16 by one instruction a value, where the compiler's own conversion takes one and a half."""
    if INTERPRETED:
        wide = x.to(tl.float32)
    elif x.dtype == tl.bfloat16:
        wide = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r", [x], tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def normalised_parts(
    x, channels: tl.constexpr, eps, ROWS: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr
):
    """`normalised` for rows in parts.  x: a tuple of (ROWS, WIDTH) float32 -> same"""
    total = x[0]
    for part in tl.static_range(1, PARTS):
        total += x[part]
    mean = tl.sum(total, axis=1, keep_dims=True) / channels
    squares = tl.zeros((ROWS, WIDTH), tl.float32)
    centred = ()
    for part in tl.static_range(PARTS):
        value = x[part] - mean
        squares += value * value
        centred = centred + (value,)  # noqa: RUF005
    factor = tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) / channels + eps)
    normal = ()
    for part in tl.static_range(PARTS):
        normal = normal + (centred[part] * factor,)  # noqa: RUF005
    return normal
