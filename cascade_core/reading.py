"""Reading of untrusted files: regular files only."""

import codecs
import errno
import os
import stat
from io import BufferedReader
from pathlib import Path


def encoding_of(start: bytes) -> str:
    """The encoding of a text with these first bytes: UTF-16 if a byte order mark says so, else UTF-8, mark or not."""
    return "utf-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def regular_status(path: str | Path) -> os.stat_result:
    """A regular file's status. Raises OSError for anything else: reading a FIFO or a device could block for ever."""
    try:
        status = os.stat(path)
    except ValueError:  # NUL, a lone surrogate
        raise OSError(errno.EINVAL, "its name holds characters that no file's name has", str(path)) from None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
    return status


def open_regular(path: str | Path) -> BufferedReader:
    """Opens a regular file. Raises OSError as `regular_status`, which looks first: opening a FIFO blocks as well."""
    regular_status(path)
    return open(path, "rb")
