"""Quantises rows to e4m3, each with a scale, within the kernels that compute them.

Scales of feature maps are powers of two. e4m3 is a floating-point format, so a value's relative rounding does not
depend on the scale, except for values below 2⁻¹⁵ of the largest that the scale allows. So a scale may be computed
from a bound of a row's values: where the largest is not known in time, and where a pass for it would cost more.
"""

import math

import torch
import triton
import triton.language as tl

from .rows import channels_of

E4M3 = torch.float8_e4m3fn
E4M3_MAX: tl.constexpr = tl.constexpr(448.0)


@triton.jit
def power_of_two(peak):
    """The least power of two that brings values up to `peak` into e4m3, and its inverse."""
    bits = (peak / E4M3_MAX).to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFFF) & 0x7F800000  # rounded up
    bits = tl.minimum(tl.maximum(bits, 1 << 23), 253 << 23)  # powers whose inverse is a normal number too
    return bits.to(tl.float32, bitcast=True), ((254 << 23) - bits).to(tl.float32, bitcast=True)


def scale_of_normed_rows(channels: int) -> float:
    """The scale, by `power_of_two`, of rows of a length up to √channels."""
    return 2.0 ** math.ceil(math.log2(channels**0.5 / E4M3_MAX.value))


@triton.jit
def store_rows(out, row_scale, value, offsets, present, row, row_present):
    """Stores rows of values: in e4m3 with their scales, or where row_scale is None in the type of `out`.

    value, offsets, present: (ROWS, BLOCK), value zero beside the channels; row, row_present: (ROWS, 1)
    """
    if row_scale is not None:
        peak = tl.max(tl.abs(value), axis=1, keep_dims=True)
        scale, inverse = power_of_two(peak)
        value = value * inverse
        tl.store(row_scale + row, scale, mask=row_present)
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=present)


@triton.jit
def store_parts(
    out, row_scale, value, offsets, present, row,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """`store_rows` for rows in parts, with the scale SCALE for all.

    value: a tuple of (ROWS, WIDTH); offsets: of each row's first channel; offsets, present, row: (ROWS, 1)
    """
    if row_scale is None:
        inverse = tl.zeros_like(row).to(tl.float32) + 1.0
    else:
        inverse = tl.zeros_like(row).to(tl.float32) + 1.0 / SCALE
        tl.store(row_scale + row, tl.zeros_like(row).to(tl.float32) + SCALE, mask=present)
    for part in tl.static_range(PARTS):
        c = channels_of(part, WIDTH)
        stored = (value[part] * inverse).to(out.dtype.element_ty)
        tl.store(tl.max_contiguous(out + (offsets + c), (1, 8)), stored, mask=present)
