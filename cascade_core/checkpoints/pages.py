"""The memory of mapped files: pages that the system can read again, and so need not be kept."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor


def mapped_files() -> list[tuple[int, int]]:
    """(start, end) of every file mapped into this process of which no page was changed; Linux only, else none.

    What was written to a private mapping lies in the process alone, and would be lost with its page.
    """
    try:
        lines = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found: list[tuple[int, int]] = []
    for line in lines:
        first, *rest = line.split(maxsplit=5)
        if not first.endswith(":"):
            start, _, end = first.partition("-")
            if len(rest) == 5 and rest[3] != "0" and rest[0].endswith("p"):  # an inode; private
                found.append((int(start, 16), int(end, 16)))
                begun = True
            else:
                begun = False
        elif first == "Anonymous:" and begun and rest[0] != "0":
            found.pop()
    return found


def forget_pages(tensors: Iterable[Tensor], files: Iterable[tuple[int, int]]) -> None:
    """Gives back the memory of mapped tensors: they stay as they are and are read from their file when next used.

    files: `mapped_files()`; tensors that lie in none of them are left alone.
    """
    files = list(files)
    for tensor in tensors:
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if any(first <= start and end <= last for first, last in files):
            start = (
                -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            )  # what shares a page with another's tensor stays
            length = (end // mmap.PAGESIZE) * mmap.PAGESIZE - start
            if length > 0:
                _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
