"""Tile configurations of fused matrix products, and the table of the fastest measured ones.

`benchmarks/tune_products.py` writes `tuned.json`: by device, function of products.py and size "MxNxK", the fields of a
Config, or "cublas" where PyTorch's own product followed by separate kernels is faster. A device without measurements
uses those of another with the same compute capability (an H200 uses the H100's).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..card import Card, card_of

TABLE = Path(__file__).parents[1] / "tuned.json"
CUBLAS = "cublas"
MAX_ROW_RATIO = 2.0  # between a product that is not in the table and the entry used for it


@dataclass(frozen=True)
class Config:
    """Tile configuration of a product.

    A tile has block_m × block_n results, computed block_k of K at a time by `warps` warps, with `stages` - 1 loads in
    flight; `group` rows of tiles are computed together. schedule: see matmul.py. tma: load operands with the tensor
    memory accelerator (compute capability 9 and up). per_sm: resident programs per multiprocessor, for the schedule
    `loop`.
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


PORTABLE = Config(64, 64, 32, warps=4, stages=2)  # fits every card's shared memory
_PERSISTENT = Config(128, 128, 128, warps=4, schedule="loop", tma=True, per_sm=2)
UNMEASURED = {  # by major compute capability and op; any other is left to cuBLAS
    (9, "linear_e4m3"): _PERSISTENT,
    (9, "linear_gelu_response_e4m3"): _PERSISTENT,
    # Leaves more registers for the matrix that is added.
    (9, "add_linear_e4m3"): Config(128, 128, 128, warps=8, stages=4, tma=True),
}


def choose(op: str, m: int, n: int, k: int, device: torch.device | str) -> Config | None:
    """The fastest known Config of `op` for x: (m, k), w: (n, k); None for cuBLAS.

    op: a function of products.py, with the type of both factors, "add_linear_e4m3", or of w alone, "linear_int8"
    """
    card = card_of(torch.device(device))
    return None if card is None else _choose(op, m, n, k, card)


@cache
def _choose(op: str, m: int, n: int, k: int, card: Card) -> Config | None:
    winners = for_device(_table(), device_key(card)).get(op)
    if not winners:
        return UNMEASURED.get((card.capability[0], op))
    winner = nearest(winners, m, n, k)
    return Config(**winner) if isinstance(winner, dict) else None


def device_key(card: Card) -> str:
    """Compute capability and name: "9.0 NVIDIA H100 80GB HBM3"."""
    major, minor = card.capability
    return f"{major}.{minor} {card.name}"


def for_device(table: dict[str, Any], key: str) -> dict[str, Any]:
    """Measurements on the device, or on the first other one with its compute capability, by function."""
    capability, _, _ = key.partition(" ")
    names = [name for name in table if name.split()[0] == capability and name != key]
    winners: dict[str, Any] = {}
    for name in [*reversed(names), key]:
        winners |= table.get(name, {})
    return winners


def nearest(winners: dict[str, Any], m: int, n: int, k: int) -> dict[str, Any] | str:
    """The winner for the same weights and the nearest number of rows."""
    ratios = {}
    for size, winner in winners.items():
        rows, *weights = map(int, size.split("x"))
        ratio = max(m / rows, rows / m)
        if weights == [n, k] and ratio <= MAX_ROW_RATIO:
            ratios[ratio] = winner
    return ratios[min(ratios)] if ratios else CUBLAS


@cache
def _table() -> dict[str, dict[str, dict[str, Any]]]:
    return json.loads(TABLE.read_text(encoding="utf-8"))
