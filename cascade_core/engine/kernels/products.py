"""Matrix products fused with the operations that follow them in a residual block.

x: (B · N, K), N rows an image; w: (out, K) as nn.Linear has it; all contiguous, in bfloat16, float16 or float32. x
and w may both be e4m3, and w alone int8. Accumulators are float32 and rounded once.

row_scale (B · N,), column_scale (out,): float32 scales of quantised rows of x and of w (`fp8.py`)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..card import card_of
from .launch import launch, tensor_descriptor
from .matmul import SCHEDULES, product
from .tuned import PORTABLE, Config, choose

__all__ = [
    "Config",
    "add_linear",
    "choose",
    "linear",
    "linear_gelu",
    "linear_gelu_response",
    "response_chunks",
]

CHUNK = 64  # rows per sum of squares where a tile's rows do not divide an image's


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


def add_linear(
    x: Tensor,
    w: Tensor,
    out: Tensor,
    config: Config | None = None,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
) -> Tensor:
    """out = out + x wᵀ.  out: (B · N, out)"""
    return _multiply(x, w, None, out, config, row_scale=row_scale, column_scale=column_scale, add=True)


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
        rows=rows_per_image, row_scale=row_scale, column_scale=column_scale, partial=partial, gelu=True,
    )  # fmt: skip


def response_chunks(rows_per_image: int, config: Config | None = None) -> int:
    """The number of chunks per image for which `linear_gelu_response` keeps a sum each."""
    return _ceil_div(rows_per_image, _chunk(rows_per_image, config or PORTABLE))


def _chunk(rows: int, config: Config) -> int:
    return config.block_m if rows % config.block_m == 0 else min(CHUNK, config.block_m)


def _ceil_div(whole: int, part: int) -> int:
    return -(-whole // part)


def _multiply(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    out: Tensor,
    config: Config | None,
    *,
    rows: int | None = None,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    partial: Tensor | None = None,
    gelu: bool = False,
    add: bool = False,
) -> Tensor:
    """Launches `matmul.product`.  rows: of one image; partial: takes the sums of squares of the results"""
    config = config or PORTABLE
    (m, k), n = x.shape, len(w)
    rows = rows or m
    chunk = _chunk(rows, config)
    chunks = _ceil_div(rows, chunk)
    padded = rows if partial is None else chunks * chunk
    tiles_m, tiles_n = _ceil_div(m // rows * padded, config.block_m), _ceil_div(n, config.block_n)
    programs = _programs(config, tiles_m * tiles_n, x.device)
    tma = config.tma and padded == rows and all(k * t.element_size() % 16 == 0 for t in (x, w))
    launch(product, (programs,))(
        tensor_descriptor(x, config.block_m, config.block_k) if tma else x,
        tensor_descriptor(w, config.block_n, config.block_k) if tma else w,
        row_scale, column_scale, bias, out, partial,
        m, n, k, rows, padded, m // rows * chunks, tiles_m, tiles_n, programs,
        GELU=gelu,
        RESPONSE=partial is not None,
        ADD=add,
        PADDED=padded != rows,
        EVEN_K=k % config.block_k == 0,
        PRECISION="ieee",
        CONVERT=w.dtype != x.dtype,
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


def _programs(config: Config, tiles: int, device: torch.device) -> int:
    card = card_of(device)
    multiprocessors = card.multiprocessors if card else 4  # interpreted
    return tiles if config.schedule == "tile" else min(tiles, config.per_sm * multiprocessors)
