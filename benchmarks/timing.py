"""Time and memory of a call, on a graphics card or on a processor."""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

GB = 1e9


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call: Callable[[], Any], device: torch.device, runs: int) -> list[float]:
    """Milliseconds of each run, on a card between two events of its stream."""
    if device.type != "cuda":
        return [1000 * seconds(call, device) for _ in range(runs)]
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for before, after in events:
        before.record()
        call()
        after.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) for before, after in events]


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run by the clock, until the device is idle."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def cost(call: Callable[[], Any], device: torch.device, runs: int, warm: int) -> dict[str, float]:
    """Median time in ms, and peak memory in GB beside what was allocated before the first call."""
    clean(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    for _ in range(warm):
        call()
    synchronise(device)
    median = statistics.median(milliseconds(call, device, runs))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {"ms": median, "peak_gb": (peak - before) / GB}


def clean(device: torch.device) -> None:
    """Frees unreferenced memory and resets the peak counter."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """|value − reference| / |reference| over all numbers."""
    reference = reference.double()
    return float(torch.linalg.vector_norm(value.double() - reference) / torch.linalg.vector_norm(reference))
