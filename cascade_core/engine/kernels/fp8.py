"""Quantised operands: e4m3 for rows and weights on cards that multiply it, int8 for weights where memory is short.

Each row (a token, or a weight's output channel) has a scale that maps its largest value to the largest of the format.
The rounding error is then at most 1/16 of a value or, near zero, 2⁻¹⁰ scales in e4m3, and half a scale in int8.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import products
from .launch import launch
from .products import Config
from .quantise import E4M3, store_rows
from .rows import row_tile

ELEMENTS = 8192  # of a tile, by eight warps
WARPS = 8


def quantise_rows(x: Tensor, x8: Tensor | None = None, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x: (M, K) -> e4m3 (M, K), scales (M,) float32."""
    return _quantise(x, None, len(x), x8, scale)


def apply_response_quantise(
    h: Tensor, scale: Tensor, h8: Tensor | None = None, row_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantises h · scale, each image by its own, as `quantise_rows`.  h: (B, N, K), scale: (B, K) float32

    -> e4m3 (B · N, K), scales (B · N,) float32
    """
    return _quantise(h.flatten(0, 1), scale, h.shape[1], h8, row_scale)


def quantised_linear(
    x8: Tensor,
    row_scale: Tensor,
    w8: Tensor,
    column_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    config: Config | None = None,
) -> Tensor:
    """out = x wᵀ + bias of operands from `quantise_rows` and `quantise_weight`.

    config: of our product; None: cuBLAS's or CUTLASS's where possible
    """
    if config or out.dtype != torch.bfloat16 or w8.shape[0] % 16 or w8.shape[1] % 16:
        return scaled_product(x8, row_scale, w8, column_scale, bias, out, config)
    if out.is_meta:  # compiling ahead: PyTorch's product has no meta implementation
        return out
    scales = row_scale[:, None], column_scale[None, :]
    return torch.ops.aten._scaled_mm.out(x8, w8.T, *scales, bias, None, out.dtype, True, out=out)


def scaled_product(
    x8: Tensor,
    row_scale: Tensor,
    w8: Tensor,
    column_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    config: Config | None = None,
) -> Tensor:
    """`quantised_linear` as a Triton kernel, for any size and dtype of `out`."""
    return products.linear(x8, w8, bias, out, config, row_scale=row_scale, column_scale=column_scale)


def _quantise(
    x: Tensor, channel_scale: Tensor | None, rows_per_image: int, x8: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    m, k = x.shape
    x8 = torch.empty_like(x, dtype=E4M3) if x8 is None else x8
    scale = x.new_empty(m, dtype=torch.float32) if scale is None else scale
    rows, block = row_tile(k, ELEMENTS)
    launch(_quantise_rows, (triton.cdiv(m, rows),))(
        x, channel_scale, x8, scale, m, rows_per_image, k, rows, block, num_warps=WARPS
    )
    return x8, scale


@triton.jit(do_not_specialize=["m", "rows_per_image"])
def _quantise_rows(
    x, channel_scale, x8, scale, m, rows_per_image,
    k: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    present = (row < m) & (c < k)
    offsets = row.to(tl.int64) * k + c
    value = tl.load(x + offsets, mask=present, other=0.0).to(tl.float32)
    if channel_scale is not None:
        value *= tl.load(channel_scale + row // rows_per_image * k + c, mask=present, other=0.0)
    store_rows(x8, scale, value, offsets, present, row, row < m)
