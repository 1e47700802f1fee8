"""How matrix products are cut up, and which way has been measured to be fastest.

`benchmarks/tune_products.py` writes `tuned.json`: by device, function of products.py and size "M×N×K" (with x for ×),
the fields of a Config, or "cublas" where PyTorch's own product with kernels around it is faster. A device that is not
in it goes by one of the same compute capability (an H200 by the H100).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).parents[1] / "tuned.json"
CUBLAS = "cublas"
NEAR = 2.0  # a product that is not in the table is computed as the one with at most so many times more or fewer rows


@dataclass(frozen=True)
class Config:
    """How a product is cut up.

    A tile has block_m × block_n results, computed block_k of K at a time by `warps` warps, with `stages` - 1 loads
    under way; `group` rows of tiles are computed together. `schedule`: see matmul.py. `tma`: operands are loaded by
    the tensor memory accelerator (compute capability 9 and up). `per_sm`: programs at a time on a multiprocessor,
    for the schedule `loop`.
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


def choose(op: str, m: int, n: int, k: int, device: torch.device | str) -> Config | None:
    """The fastest way known to compute `op`, a function of products.py, with x: (m, k), w: (n, k). None: cuBLAS."""
    return _choose(op, m, n, k, torch.device(device))


@cache
def _choose(op: str, m: int, n: int, k: int, device: torch.device) -> Config | None:
    if device.type != "cuda":
        return None
    winner = nearest(for_device(_table(), device_key(device)).get(op, {}), m, n, k)
    return Config(**winner) if isinstance(winner, dict) else None


def device_key(device: torch.device) -> str:
    """Compute capability and name: "9.0 NVIDIA H100 80GB HBM3"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor} {torch.cuda.get_device_name(device)}"


def for_device(table: dict[str, Any], key: str) -> dict[str, Any]:
    """What was measured on that device, or else on the first of its compute capability; {}: nothing."""
    capability, _, _ = key.partition(" ")
    return table.get(key) or next((of for other, of in table.items() if other.split()[0] == capability), {})


def nearest(winners: dict[str, Any], m: int, n: int, k: int) -> dict[str, Any] | str:
    """The winner for the same weights and as many rows, or about as many."""
    distances = {}
    for size, winner in winners.items():
        rows, *weights = map(int, size.split("x"))
        distance = max(m / rows, rows / m)
        if weights == [n, k] and distance <= NEAR:
            distances[distance] = winner
    return distances[min(distances)] if distances else CUBLAS


@cache
def _table() -> dict[str, dict[str, dict[str, Any]]]:
    return json.loads(TABLE.read_text(encoding="utf-8"))
