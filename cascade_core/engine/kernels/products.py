"""Matrix products with what stands next to them in a residual block, in one kernel each.

x: (B · N, K), N rows an image; w: (out, K) as nn.Linear has it; all contiguous, in bfloat16, float16 or float32.
Sums are in float32 and rounded once. Operands may be quantised (`fp8.py`): then `row_scale` (B · N,) and
`column_scale` (out,), float32, are what the rows of x and of w have been divided by.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .launch import described, launch
from .matmul import SCHEDULES, product
from .tuned import ANYWHERE, Config, choose

__all__ = [
    "Config",
    "choose",
    "linear",
    "linear_add",
    "linear_gelu",
    "linear_gelu_response",
    "response_chunks",
    "scaled_linear_add",
]

CHUNK = 64  # rows of a sum of squares where a tile's rows do not divide an image's


def linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    out: Tensor,
    config: Config | None = None,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
) -> Tensor:
    """out = x wᵀ + bias.  out: (B · N, out)"""
    return _multiply(x, w, bias, out, config, row_scale=row_scale, column_scale=column_scale)


def linear_add(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    out: Tensor,
    config: Config | None = None,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
) -> Tensor:
    """out = out + x wᵀ + bias.  out: (B · N, out)"""
    return _multiply(x, w, bias, out, config, row_scale=row_scale, column_scale=column_scale, add=True)


def linear_gelu(
    x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, config: Config | None = None
) -> Tensor:
    """out = GELU(x wᵀ + bias).  out: (B · N, out)"""
    return _multiply(x, w, bias, out, config, gelu=True)


def linear_gelu_response(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    rows_per_image: int,
    out: Tensor,
    partial: Tensor,
    config: Config | None = None,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
) -> Tensor:
    """out = GELU(x wᵀ + bias); partial = sums of the squares of out, as rounded, over chunks of an image's rows.

    partial: (B, response_chunks(rows_per_image, config), out) float32, as `response_scale` takes it
    """
    return _multiply(
        x, w, bias, out, config,
        rows=rows_per_image, partial=partial, row_scale=row_scale, column_scale=column_scale, gelu=True,
    )  # fmt: skip


def scaled_linear_add(
    h: Tensor,
    scale: Tensor,
    w: Tensor,
    bias: Tensor | None,
    rows_per_image: int,
    x: Tensor,
    config: Config | None = None,
) -> Tensor:
    """x = x + (h · scale) wᵀ + bias; h · scale is rounded to h's dtype, as if it had been stored.

    h: (B · N, K), scale: (B, K) float32, x: (B · N, out)
    """
    return _multiply(h, w, bias, x, config, rows=rows_per_image, scale=scale, add=True)


def response_chunks(rows_per_image: int, config: Config | None = None) -> int:
    """How many chunks of an image `linear_gelu_response` sums up on their own."""
    return _count(rows_per_image, _chunk(rows_per_image, config or ANYWHERE))


def _chunk(rows: int, config: Config) -> int:
    return config.block_m if rows % config.block_m == 0 else min(CHUNK, config.block_m)


def _count(whole: int, part: int) -> int:
    return -(-whole // part)


def _multiply(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    out: Tensor,
    config: Config | None,
    *,
    rows: int | None = None,
    scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    partial: Tensor | None = None,
    gelu: bool = False,
    add: bool = False,
) -> Tensor:
    """What all of these are: `matmul.product`.  partial: for sums of squares of the results"""
    config = config or ANYWHERE
    (m, k), n = x.shape, len(w)
    rows = rows or m
    chunk = _chunk(rows, config)
    chunks = _count(rows, chunk)
    padded = rows if partial is None else chunks * chunk
    tiles_m, tiles_n = _count(m // rows * padded, config.block_m), _count(n, config.block_n)
    programs = _programs(config, tiles_m * tiles_n, x.device)
    tma = config.tma and padded == rows and all(k * t.element_size() % 16 == 0 for t in (x, w))
    launch(product, (programs,))(
        described(x, config.block_m, config.block_k) if tma else x,
        described(w, config.block_n, config.block_k) if tma else w,
        scale, row_scale, column_scale, bias, out, partial,
        m, n, k, rows, padded, m // rows * chunks, tiles_m, tiles_n, programs,
        SPANS=0 if scale is None else _spans(rows, config.block_m),
        GELU=gelu,
        RESPONSE=partial is not None,
        ADD=add,
        PADDED=padded != rows,
        EVEN_K=k % config.block_k == 0,
        PRECISION="ieee",
        SCHEDULE=SCHEDULES[config.schedule],
        TMA=tma,
        CHUNK=chunk,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP=config.group,
        num_warps=config.warps,
        num_stages=config.stages,
    )  # fmt: skip
    return out


def _spans(rows: int, block_m: int) -> int:
    """Of how many images a tile's rows may be; 3 is any number."""
    if rows % block_m == 0:
        return 1
    return 2 if rows >= block_m else 3


def _programs(config: Config, tiles: int, device: torch.device) -> int:
    return tiles if config.schedule == "tile" else min(tiles, config.per_sm * _multiprocessors(device))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
