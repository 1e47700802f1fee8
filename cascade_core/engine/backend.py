"""Which operations run on a device: the fused kernels, those with fp8 products, or plain PyTorch."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch

from ..errors import CascadeError
from . import operations
from .card import card_of
from .operations import Operations

Precision = Literal["exact", "fp8"]


def operations_on(device: torch.device, precision: Precision = "exact") -> Operations:
    """Fused kernels where they run, else plain PyTorch.

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
    if card is not None and card.capability >= (8, 0):
        from . import cuda

        return cuda
    if device.type == "cpu":
        _keep_freed_memory()
    return operations


@cache
def _keep_freed_memory() -> None:
    operations.keep_freed_memory()


def _device_name(device: torch.device) -> str:
    card = card_of(device)
    if card is not None:
        return card.name
    if device.type != "cuda":
        return "the processor" if device.type == "cpu" else str(device)
    return torch.cuda.get_device_name(device) + ", without Triton,"
