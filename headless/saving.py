"""Atomic writing of files: a failure leaves nothing half-written and nothing overwritten."""

from __future__ import annotations

import errno
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ..cascade_core.errors import CascadeError

_ADVICE = {
    errno.ENOSPC: "free some space or save elsewhere (--output)",
    errno.EDQUOT: "free some space or save elsewhere (--output)",
    errno.EFBIG: "free some space or save elsewhere (--output)",
    errno.ENAMETOOLONG: "choose a shorter filename_prefix",
}


def check_folder(folder: Path) -> None:
    """Raises CascadeError unless files can be made in `folder`, or it can be made; leaves nothing behind.

    Called before the work, because a picture that cannot be saved afterwards is lost.
    """
    ancestor = next((parent for parent in (folder, *folder.parents) if os.path.exists(parent)), Path())
    try:
        tempfile.TemporaryFile(dir=ancestor).close()
    except OSError as error:
        raise _cannot_save(folder, error) from error


def _cannot_save(path: Path, error: OSError) -> CascadeError:
    advice = _ADVICE.get(error.errno or 0, "choose a folder that can be written to (--output)")
    return CascadeError(f"Cannot save {path}: {error.strerror}; {advice}.")


def resolve_prefix(prefix: str, folder: Path, width: int, height: int) -> tuple[Path, str]:
    """Resolves a `filename_prefix` such as `stars/red_%width%` into (folder, start of the name).

    %width%, %height%, %year%, %month%, %day%, %hour%, %minute% and %second% are filled in.
    Raises CascadeError for a prefix that leads out of the folder or names no file.
    """
    values = {"width": str(width), "height": str(height)}
    now = time.localtime()
    names = ("year", "month", "day", "hour", "minute", "second")
    values |= {name: f"{value:02}" for name, value in zip(names, now[:6], strict=True)}
    prefix = re.sub(r"%(\w+)%", lambda match: values.get(match[1], match[0]), prefix)
    root = folder.resolve()
    path = root if "\0" in prefix or prefix.endswith(("/", "\\")) else (root / prefix).resolve()
    if path == root or not path.is_relative_to(root):
        raise CascadeError(f"Cannot save as {prefix!r}: a filename_prefix names files inside {folder}.")
    return folder / path.relative_to(root).parent, path.name


def next_counter(folder: Path, start: str) -> int:
    """Next free number among the folder's files named `START_00001_…`."""
    pattern = re.compile(re.escape(start) + r"_(\d+)_?\.", re.IGNORECASE)
    matches = (pattern.match(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return 1 + max((int(match[1]) for match in matches if match), default=0)


def save_new(folder: Path, name_of: Callable[[int], str], counter: int, data: bytes) -> Path:
    """Writes `data` to the first free name from `name_of(counter)` on; returns the path.

    The bytes go to a temporary file first; a file appears under its final name whole or not at all.
    Raises CascadeError that names the path where the folder is a file, not writable or full.
    """
    target = folder / name_of(counter)
    temporary = folder / f".{target.name}.{os.getpid()}.part"
    reserved = False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        while not (reserved := _reserve(target)):
            counter += 1
            target = folder / name_of(counter)
        os.replace(temporary, target)
    except BaseException as error:  # also when interrupted
        _remove(temporary)
        if reserved:
            _remove(target)
        if isinstance(error, OSError):
            raise _cannot_save(target, error) from error
        raise
    return target


def _reserve(target: Path) -> bool:
    """Reserves a name for the file that is about to be moved there; False where it is taken."""
    try:
        target.open("xb").close()
    except FileExistsError:
        return False
    return True


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # its folder is not a folder: then there is nothing to remove
        return
