"""Which operations run on a device: the fused kernels, those with fp8 products, or plain PyTorch."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch

from ..accelerators import device_name, is_nvidia
from ..errors import CascadeError
from . import operations
from .card import card_of
from .operations import Operations

Precision = Literal["exact", "fp8"]
Way = Literal["exact", "fp8", "plain"]  # a precision, or plain PyTorch in that of the weights

# What goes on where the kernels of a precision fail, each with what is lost where it is left (`Fallback`).
_EXACT: list[tuple[Way, str]] = [
    ("exact", "in plain PyTorch, which takes about twice as long"),
    ("plain", ""),
]
WAYS: dict[Precision, list[tuple[Way, str]]] = {
    "exact": _EXACT,
    "fp8": [("fp8", "in the precision of its weights, which takes longer"), *_EXACT],
}


def operations_on(device: torch.device, precision: Way = "exact") -> Operations:
    """Fused kernels where they run, else (or with "plain") plain PyTorch.

    Raises CascadeError for fp8 on devices that do not multiply it: below compute capability 8.9.
    """
    card = card_of(device)
    if precision == "fp8":
        if card is None or card.capability < (8, 9):
            raise CascadeError(
                "fp8 needs an NVIDIA card of compute capability 8.9 or newer (RTX 40 series, L4, H100) with Triton, "
                f"and {_device_name(device)} is not one; choose another precision."
            )
        from . import fp8

        return fp8
    if precision == "exact" and card is not None and card.capability >= (7, 0):
        from . import cublas, cuda

        return cuda if card.capability >= (8, 0) else cublas
    if device.type == "cpu":
        _keep_freed_memory()
    return operations


@cache
def _keep_freed_memory() -> None:
    operations.keep_freed_memory()


def _device_name(device: torch.device) -> str:
    card = card_of(device)
    without = ", without Triton," if card is None and is_nvidia(device) else ""
    return (device_name(device) if card is None else card.name) + without
