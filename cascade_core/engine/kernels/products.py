"""Matrix products with what stands next to them in a residual block, and which way to compute them is fastest.

x: (B · N, K), N rows an image; w: (out, K) as nn.Linear has it; all contiguous, in bfloat16, float16 or float32.
Sums are in float32 and rounded once. `Config` says how a product is cut up; `choose` knows what has been measured
to be fastest (`benchmarks/tune_products.py` writes `tuned.json`), and where that is cuBLAS.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .matmul import SCHEDULES, product

TUNED = Path(__file__).parents[1] / "tuned.json"
CUBLAS = "cublas"
CHUNK = 64  # rows of a sum of squares where a tile's rows do not divide an image's
PART = 128 * 256  # the largest tile that two programs may share
NEAR = 2.0  # a product not in the table is computed like one with so many times more or fewer rows


@dataclass(frozen=True)
class Config:
    """How a product is cut up.

    A tile has block_m × block_n results, computed block_k of K at a time by `warps` warps, with `stages` - 1 loads
    under way; `group` rows of tiles are computed together. `schedule`: see matmul.py. `tma`: operands are loaded by
    the tensor memory accelerator (compute capability 9 and up). `per_sm`: programs at a time on a multiprocessor,
    for the schedules `loop` and `stream`.
    """

    block_m: int
    block_n: int
    block_k: int = 64
    warps: int = 8
    stages: int = 3
    group: int = 8
    schedule: str = "tile"
    tma: bool = False
    per_sm: int = 1


ANYWHERE = Config(64, 64, 32, warps=4, stages=2)  # within every card's shared memory


def linear(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, config: Config | None = None) -> Tensor:
    """out = x wᵀ + bias.  out: (M, out)"""
    return _launch(x, w, bias, out, config or ANYWHERE)


def linear_add(
    x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, config: Config | None = None
) -> Tensor:
    """out = out + x wᵀ + bias.  out: (M, out)"""
    return _launch(x, w, bias, out, config or ANYWHERE, add=True)


def linear_gelu_response(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    rows_per_image: int,
    out: Tensor,
    partial: Tensor,
    config: Config | None = None,
) -> Tensor:
    """out = GELU(x wᵀ + bias); partial = sums of the squares of out, as rounded, over chunks of an image's rows.

    partial: (B, response_chunks(rows_per_image, config), out) float32, as `response_scale` takes it
    """
    return _launch(x, w, bias, out, config or ANYWHERE, rows=rows_per_image, partial=partial)


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

    scale: (B, K) float32, x: (B · N, out)
    """
    return _launch(h, w, bias, x, config or ANYWHERE, rows=rows_per_image, scale=scale, add=True)


def response_chunks(rows_per_image: int, config: Config | None = None) -> int:
    """How many chunks of an image `linear_gelu_response` sums up on their own."""
    return _parts(rows_per_image, _chunk(rows_per_image, config or ANYWHERE))


def choose(op: str, m: int, n: int, k: int, device: torch.device | str) -> Config | None:
    """The fastest way known to compute `op` (a function of this module) with x: (m, k), w: (n, k); None: cuBLAS."""
    return _choose(op, m, n, k, torch.device(device))


def _parts(whole: int, part: int) -> int:
    return -(-whole // part)


def _chunk(rows: int, config: Config) -> int:
    return config.block_m if rows % config.block_m == 0 else min(CHUNK, config.block_m)


@cache
def _choose(op: str, m: int, n: int, k: int, device: torch.device) -> Config | None:
    if device.type != "cuda":
        return None
    winners = _tuned().get(torch.cuda.get_device_name(device), {}).get(op, {})
    distances = {}
    for size, winner in winners.items():
        rows, *weights = map(int, size.split("x"))
        distance = max(m / rows, rows / m)
        if weights == [n, k] and distance <= NEAR:
            distances[distance] = winner
    winner = distances[min(distances)] if distances else CUBLAS
    return None if winner == CUBLAS else Config(**winner)


@cache
def _tuned() -> dict[str, dict[str, dict[str, str | dict]]]:
    return json.loads(TUNED.read_text(encoding="utf-8"))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def _workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """Parts of tiles and counters of the schedule `stream`, made once, by a product that no graph records.

    One for the device: products on several streams at once may not both be scheduled so.
    """
    programs = _multiprocessors(device)
    parts = torch.empty(2 * programs * PART, dtype=torch.float32, device=device)
    return parts, torch.zeros(8 * programs, dtype=torch.int32, device=device)


def _described(matrix: Tensor, rows: int, columns: int) -> Any:
    """For the tensor memory accelerator, tile by tile."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, [rows, columns])


def _launch(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    out: Tensor,
    config: Config,
    *,
    rows: int | None = None,
    scale: Tensor | None = None,
    partial: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    m, k = x.shape
    n = len(w)
    rows = rows or m
    chunk = _chunk(rows, config)
    chunks = _parts(rows, chunk)
    padded = chunks * chunk if partial is not None else rows
    tiles_m, tiles_n = _parts(m // rows * padded, config.block_m), _parts(n, config.block_n)
    tiles = programs = tiles_m * tiles_n
    streamed, parts, counters = 0, None, None
    if config.schedule != "tile":
        programs = config.per_sm * _multiprocessors(x.device)
    if config.schedule == "stream":
        parts, counters = _workspace(x.device)
        if (
            tiles % programs
        ):  # shares of one to two tiles, as far as there are so many; full waves before that
            streamed = tiles - max(tiles // programs - 1, 0) * programs
    tma = config.tma and padded == rows and k * x.element_size() % 16 == 0
    spans = 0 if scale is None else 1 if rows % config.block_m == 0 else 2 if rows >= config.block_m else 3
    launch: Any = product[(programs,)]
    launch(
        _described(x, config.block_m, config.block_k) if tma else x,
        _described(w, config.block_n, config.block_k) if tma else w,
        scale, bias, out, partial, parts, counters,
        m, n, k, rows, padded, m // rows * chunks, tiles_m, tiles_n, streamed, programs,
        SPANS=spans,
        GELU=partial is not None,
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
