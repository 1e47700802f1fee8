"""Dequantises 8-bit weights to 16 bits for cuBLAS, where that is faster than converting them within a product."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

BLOCK_K, ROWS = 512, 16  # of a program's tile


def dequantise(weight8: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """out = weight8 · scale, rounded once.  weight8: (N, K) int8 or e4m3, scale: (N,) float32, out: (N, K)"""
    n, k = out.shape
    grid = (triton.cdiv(k, BLOCK_K), triton.cdiv(n, ROWS))
    launch(_dequantise, grid)(weight8, scale, out, n, k, BLOCK_K, ROWS)
    return out


@triton.jit(do_not_specialize=["n"])
def _dequantise(weight8, scale, out, n, k, BLOCK_K: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    present = (row < n) & (c < k)
    offsets = row.to(tl.int64) * k + c
    value = tl.load(weight8 + offsets, mask=present, other=0.0).to(tl.float32)
    value *= tl.load(scale + row, mask=row < n, other=0.0)
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=present)
