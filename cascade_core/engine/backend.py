"""Chooses the operations for a device: fused kernels, those with 8-bit products, or plain PyTorch."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch

from . import operations
from .card import card_of
from .operations import Operations

Precision = Literal["exact", "fp8", "int8"]
Way = Literal["exact", "fp8", "int8", "plain"]  # a precision, or plain PyTorch in the biases' precision

# The ways to compute at each precision, fastest first; the text says what the next way is like (`Fallback`).
_DEQUANTISED = "in the precision of its biases, weight after weight, which takes longer"
_EXACT: list[tuple[Way, str]] = [
    ("exact", "in plain PyTorch, which takes about twice as long"),
    ("plain", ""),
]
WAYS: dict[Precision, list[tuple[Way, str]]] = {
    "exact": _EXACT,
    "fp8": [("fp8", _DEQUANTISED), *_EXACT],
    "int8": [("int8", _DEQUANTISED), *_EXACT],
}


def operations_on(device: torch.device, precision: Way = "exact") -> Operations:
    """Fused kernels where they run, else (or with "plain") plain PyTorch.

    fp8 multiplies in e4m3 from compute capability 8.9 on, int8 converts weights as they are read from 8.0 on; elsewhere
    weights are dequantised, product by product.
    """
    card = card_of(device)
    if precision == "fp8" and card is not None and card.capability >= (8, 9):
        from . import fp8

        return fp8
    if precision == "int8" and card is not None and card.capability >= (8, 0):
        from . import int8

        return int8
    if precision != "plain" and card is not None and card.capability >= (7, 0):
        from . import cublas, cuda

        return cuda if card.capability >= (8, 0) else cublas
    if device.type == "cpu":
        _keep_freed_memory()
    return operations


@cache
def _keep_freed_memory() -> None:
    operations.keep_freed_memory()
