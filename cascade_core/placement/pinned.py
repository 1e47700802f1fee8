"""Pinned memory, which a device reads by itself, and parsing of amounts of memory."""

from __future__ import annotations

import mmap
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CascadeError, quoted

RESERVED = 1 << 30  # bytes of main memory that pinned weights leave free
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_bytes(text: str) -> int:
    """ "6GB", "5.5 GiB", "800MB" or a plain number, in bytes. Raises CascadeError for anything else."""
    match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([KMG]?I?)B?\s*", text[:100].upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if len(text) > 100 or not size:
        raise CascadeError(
            f"{quoted(text)} is not an amount of memory; write one such as 6GB, 5.5GiB or 800MB."
        )
    return size


def available_bytes() -> int | None:
    """Bytes of main memory that programs can still allocate; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


class _Pages(mmap.mmap):
    """Anonymous pages that are unpinned before they are unmapped."""

    unpin: Callable[[], object] | None = None

    def __del__(self) -> None:
        if self.unpin is not None:
            self.unpin()


def pinned_pages(size: int, pin: Callable[[int, int], bool], unpin: Callable[[int], object]) -> Tensor | None:
    """(size,) uint8 that `pin(address, size)` has pinned for the device, or None where memory is short.

    Exactly `size` bytes: torch's own allocator of pinned memory rounds up to powers of two. Where pinning fails (the
    system limits it), the pages are used unpinned, at the speed of ordinary memory. They are freed with the last
    view.
    """
    available = available_bytes()
    if available is not None and available < size + RESERVED:
        return None
    try:
        if sys.platform == "win32":
            pages = _Pages(-1, size)
        else:
            pages = _Pages(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # the kernel may lack huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)  # fewer pages to create and pin
    with torch.inference_mode():
        memory = torch.frombuffer(pages, dtype=torch.uint8)
    address = memory.data_ptr()
    if pin(address, size):
        pages.unpin = lambda: unpin(address)
    return memory
