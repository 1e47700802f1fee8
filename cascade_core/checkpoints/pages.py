"""Memory of mapped files: clean pages, which the system can read again, need not be kept."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor


def mapped_files() -> list[tuple[int, int]]:
    """(start, end) of every file mapped into this process without a changed page; empty on systems other than Linux.

    Writes to a private mapping exist in the process alone and would be lost with their page.
    """
    try:
        lines = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    files: list[tuple[int, int]] = []
    for line in lines:
        first, *rest = line.split(maxsplit=5)
        if not first.endswith(":"):
            start, _, end = first.partition("-")
            if len(rest) == 5 and rest[3] != "0" and rest[0].endswith("p"):  # an inode; private
                files.append((int(start, 16), int(end, 16)))
                begun = True
            else:
                begun = False
        elif first == "Anonymous:" and begun and rest[0] != "0":
            files.pop()
    return files


def forget_pages(tensors: Iterable[Tensor], files: Iterable[tuple[int, int]]) -> None:
    """Frees the memory of mapped tensors, which are read from their file again when next used.

    files: `mapped_files()`; tensors outside of them are left alone.
    """
    files = list(files)
    for tensor in tensors:
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if any(first <= start and end <= last for first, last in files):
            # A page shared with another tensor stays.
            start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            length = (end // mmap.PAGESIZE) * mmap.PAGESIZE - start
            if length > 0:
                _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
