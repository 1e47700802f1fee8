"""Files of other people: regular ones alone, and no more of them than was meant."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file. Raises OSError for anything else: reading a FIFO or a device could block for ever."""
    try:
        mode = os.stat(path).st_mode  # before opening, which for a FIFO blocks as well
    except ValueError:  # NUL, a lone surrogate
        raise FileNotFoundError(
            errno.ENOENT, "the name holds characters that no file's name can have"
        ) from None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
    return open(path, "rb")
