"""Bytes that a picture copies from main memory to the card, and the time that a slower bus would add.

Reads the trace written by inside_server.py.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from inside_server import MARK
from timing import GB

BUSES = (12, 25)  # GB/s that PCIe 3.0 and 4.0 of 16 lanes give
WINDOW = 0.1  # seconds in which copies hide behind kernels

Interval = tuple[float, float]


class Traced:
    """Intervals (in seconds) of a trace: of copies to the card, with their bytes, and of kernels."""

    def __init__(self, path: Path):
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        card = [
            event
            for event in events
            if event.get("ph") == "X" and event.get("cat") in ("gpu_memcpy", "kernel")
        ]
        copied = [event for event in card if event["name"].startswith("Memcpy HtoD")]
        last = next((event for event in reversed(copied) if event["args"]["bytes"] == MARK), None)
        if last is None:
            raise ValueError("the profiler's trace was cut off")
        copied.remove(last)
        self.copies = [(_interval(event), event["args"]["bytes"], event["name"]) for event in copied]
        self.kernels = [_interval(event) for event in card if event["cat"] == "kernel"]

    def summary(self) -> dict[str, Any]:
        """GB in total, from pinned and pageable memory; seconds of copies, and of those without a kernel beside."""
        copying = merged(interval for interval, _, _ in self.copies)
        beside = total(common(copying, merged(self.kernels)))

        def gigabytes(memory: str) -> float:
            return sum(size for _, size, name in self.copies if memory in name) / GB

        return {
            "gb": gigabytes(""),
            "pinned_gb": gigabytes("(Pinned"),
            "pageable_gb": gigabytes("(Pageable"),
            "count": len(self.copies),
            "seconds": total(copying),
            "alone_seconds": total(copying) - beside,
        }

    def slower(self, bus: float) -> float:
        """Seconds that the picture would take longer if no copy were faster than `bus` GB/s.

        In each tenth of a second, copies without a concurrent kernel were waited for, and take longer in proportion;
        copies beside kernels stay hidden for as long as the kernels run.
        """
        copying, computing = merged(interval for interval, _, _ in self.copies), merged(self.kernels)
        both = _by_window(copying, common(copying, computing))
        kernels = _by_window(copying, computing)
        moved = _by_window(
            copying, [interval for interval, _, _ in self.copies], [size for _, size, _ in self.copies]
        )
        longer = 0.0
        for window, seconds in _by_window(copying, copying).items():
            beside = both.get(window, 0.0)
            factor = max(1.0, moved[window] / GB / bus / seconds)
            longer += (factor - 1) * (seconds - beside)
            longer += max(0.0, factor * beside - kernels.get(window, 0.0))
        return longer


def _interval(event: dict[str, Any]) -> Interval:
    return event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The union of intervals, in order."""
    union: list[Interval] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(end, union[-1][1]))
        else:
            union.append((start, end))
    return union


def common(one: list[Interval], other: list[Interval]) -> list[Interval]:
    """The intersection of two lists of intervals, each in order and without overlaps."""
    shared, i, j = [], 0, 0
    while i < len(one) and j < len(other):
        start, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if start < end:
            shared.append((start, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return shared


def total(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def _by_window(
    beginning: list[Interval], intervals: list[Interval], amounts: list[float] | None = None
) -> dict[int, float]:
    """Seconds of the intervals, or their amounts, in each window from the first copy on."""
    windows: dict[int, float] = {}
    if not beginning:
        return windows
    origin = beginning[0][0]
    for i, (start, end) in enumerate(intervals):
        per_second = 1.0 if amounts is None else amounts[i] / max(end - start, 1e-9)
        at = start - origin
        while at < (stop := max(end, start + 1e-9) - origin):
            window = int(at // WINDOW)
            until = min(stop, (window + 1) * WINDOW)
            if until <= at:  # rounding at a window's edge
                until, window = min(stop, at + WINDOW), window + 1
            windows[window] = windows.get(window, 0.0) + (until - at) * per_second
            at = until
    return windows
