"""Tiles of whole rows of (B, N, C), and LayerNorm over them."""

import triton
import triton.language as tl

ELEMENTS = 2048  # of a tile: 16 float32 registers per thread of four warps; measured on an H100
WARPS = 4


def row_tile(channels: int, elements: int = ELEMENTS) -> tuple[int, int]:
    """(rows, channels rounded up to a power of two) of a tile of about `elements` elements."""
    block = triton.next_power_of_2(channels)
    return max(1, elements // block), block


@triton.jit
def normalised(x, inside, channels: tl.constexpr, eps):
    """LayerNorm of every row.  x: (ROWS, BLOCK) float32, zero where not `inside` (1, BLOCK) -> same"""
    mean = tl.sum(x, axis=1, keep_dims=True) / channels
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(centred * centred, axis=1, keep_dims=True) / channels
    return centred * tl.rsqrt(variance + eps)
