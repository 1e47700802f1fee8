"""Which operations run on a device: the fused kernels, those with fp8 products, or plain PyTorch."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch

from ..errors import CascadeError
from . import operations
from .operations import Operations

Precision = Literal["exact", "fp8"]


@cache
def operations_on(device: torch.device, precision: Precision = "exact") -> Operations:
    """Fused kernels where they run, else plain PyTorch.

    Raises CascadeError for fp8 on devices that do not multiply it: below compute capability 8.9.
    """
    capability = _capability(device)
    if precision == "fp8":
        if capability < (8, 9):
            raise CascadeError(
                "fp8 needs an NVIDIA card of compute capability 8.9 or newer (RTX 40 series, L4, H100) with Triton, "
                f"and {_device_name(device)} is not one; choose another precision."
            )
        from . import fp8

        return fp8
    if capability >= (8, 0):
        from . import cuda

        return cuda
    if device.type == "cpu":
        operations.keep_freed_memory()
    return operations


def _capability(device: torch.device) -> tuple[int, int]:
    """Compute capability, or (0, 0) where no kernels run."""
    has_kernels = device.type == "cuda" and find_spec("triton")
    return torch.cuda.get_device_capability(device) if has_kernels else (0, 0)


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return "the processor" if device.type == "cpu" else str(device)
    triton = "" if find_spec("triton") else ", without Triton,"
    return torch.cuda.get_device_name(device) + triton
