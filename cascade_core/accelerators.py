"""Kinds of accelerators and what torch reports about each: `cuda` is NVIDIA and AMD, `xpu` Intel, `mps` Apple.

Code that works on NVIDIA cards alone asks `is_nvidia`. The other kinds were never tried; for them only the plainest
documented calls of torch are used.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

ACCELERATORS = ("cuda", "xpu", "mps")  # in the order in which they are chosen


def is_nvidia(device: torch.device) -> bool:
    """Whether a device is an NVIDIA card; False for an AMD card under ROCm, or under ZLUDA, which poses as CUDA."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return "[ZLUDA]" not in torch.cuda.get_device_name(device)


def count(kind: str) -> int:
    """Number of devices of a kind that torch finds."""
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    module: Any = getattr(torch, kind, None)
    return module.device_count() if module is not None and module.is_available() else 0


def has_bf16(device: torch.device) -> bool:
    """Whether a device computes in bf16 at its full speed."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return device.type == "xpu"


def device_name(device: torch.device) -> str:
    """A device for a message: "NVIDIA H200", "the processor"."""
    if device.type == "cpu":
        return "the processor"
    query = _function(device, "get_device_name")
    return query(device) if query else f"the device {device}"


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished all queued work."""
    wait = None if device.type == "cpu" else _function(device, "synchronize")
    if wait is not None:
        wait() if device.type == "mps" else wait(device)


def begin_peak(device: torch.device) -> bool:
    """Starts measuring `peak_bytes`; returns whether the device can measure it."""
    reset = _function(device, "reset_peak_memory_stats")
    if reset is not None:
        reset(device)
    return reset is not None


def peak_bytes(device: torch.device) -> int:
    """Peak bytes allocated by this process since `begin_peak`; on Apple devices, those allocated now; else 0."""
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    peak = _function(device, "max_memory_allocated")
    return 0 if peak is None else peak(device)


def free_bytes(device: torch.device) -> int | None:
    """Bytes of the device that this process can still allocate; None where torch does not say."""
    try:
        module = torch.get_device_module(device.type)
        if device.type == "mps":
            return module.recommended_max_memory() - module.current_allocated_memory()
        free, _ = module.mem_get_info(device)
        return free + module.memory_reserved(device) - module.memory_allocated(device)
    except (AttributeError, RuntimeError):  # older versions, and drivers that do not report it
        return None


def trim(device: torch.device) -> None:
    """Returns memory that torch keeps cached for later allocations to the device."""
    empty_cache = _function(device, "empty_cache")
    if empty_cache is not None:
        empty_cache()


def _function(device: torch.device, name: str) -> Any:
    """A function of torch's module for this kind of device, or None where it has none."""
    try:
        return getattr(torch.get_device_module(device.type), name, None)
    except RuntimeError:  # no such module, for a backend outside of torch
        return None


def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The CUDA stream of all captures: cuBLAS keeps a workspace for each stream that it was used on."""
    return _capture_stream(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _capture_stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """A CUDA stream other than `capture_stream`: work that another thread launches on it stays out of a capture.

    PyTorch hands out 32 streams in turn, so a "new" stream may be one that is in use already.
    """
    captures = capture_stream(device)
    stream = torch.cuda.Stream(device)
    return torch.cuda.Stream(device) if stream == captures else stream
