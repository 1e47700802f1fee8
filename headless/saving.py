"""Saving of pictures: checks of the folder, and free names inside it."""

from __future__ import annotations

import errno
import itertools
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..cascade_core import writing
from ..cascade_core.errors import CascadeError, quoted
from ..cascade_core.file_names import inside, name_fault, path_fault

_ADVICE = {
    errno.ENOSPC: "free some space or save elsewhere (--output)",
    errno.EDQUOT: "free some space or save elsewhere (--output)",
    errno.EFBIG: "free some space or save elsewhere (--output)",
    errno.ENAMETOOLONG: "choose a shorter filename_prefix",
}
_WIDEST = 99_999  # stands for the width, height and number of a picture not made yet


def check_folder(folder: Path) -> None:
    """Raises CascadeError unless files can be made in `folder`, or it can be made; leaves nothing behind.

    Called before the work, because a picture that cannot be saved afterwards is lost.
    """
    try:
        writing.check_folder(folder)
    except OSError as error:
        raise _cannot_save(folder, error) from error


def check_prefix(prefix: str, folder: Path) -> None:
    """Raises CascadeError unless pictures can be saved in `folder` under this `filename_prefix`."""
    place, start = resolve_prefix(prefix, folder, _WIDEST, _WIDEST)
    try:
        writing.check_file(place / numbered(start, _WIDEST))
    except OSError as error:
        raise _cannot_save(place / start, error) from error


def _cannot_save(path: Path, error: OSError) -> CascadeError:
    advice = _ADVICE.get(error.errno or 0, "choose a folder that can be written to (--output)")
    name = str(path) if len(str(path)) < 250 else quoted(str(path), 250)
    return CascadeError(f"Cannot save {name}: {error.strerror}; {advice}.")


def resolve_prefix(prefix: str, folder: Path, width: int, height: int) -> tuple[Path, str]:
    """Resolves a `filename_prefix` such as `stars/red_%width%` into (folder, start of the name).

    %width%, %height%, %year%, %month%, %day%, %hour%, %minute% and %second% are filled in.
    Raises CascadeError for a prefix that leads out of the folder or names no file.
    """
    values = {"width": str(width), "height": str(height)}
    now = time.localtime()
    names = ("year", "month", "day", "hour", "minute", "second")
    values |= {name: f"{value:02}" for name, value in zip(names, now[:6], strict=True)}
    path = re.sub(r"%(\w+)%", lambda match: values.get(match[1], match[0]), prefix).replace("\\", "/")
    subfolder, slash, start = path.rpartition("/")
    fault = path_fault(subfolder + slash) or name_fault(numbered(start, _WIDEST))
    if start in ("", ".", ".."):
        fault = "names no file"
    place = inside(folder, subfolder) if fault is None else None
    if place is None:
        reason = fault or "leads out of the folder over a link"
        raise CascadeError(f"Cannot save as {quoted(prefix)}, which {reason}; name a file inside {folder}.")
    return place, start


def numbered(start: str, counter: int) -> str:
    return f"{start}_{counter:05}_.png"


def next_counter(folder: Path, start: str) -> int:
    """Next free number among the folder's files named `START_00001_…`; 1 where it cannot be listed."""
    pattern = re.compile(re.escape(start) + r"_(\d+)_?\.", re.IGNORECASE)
    numbers = [0]
    with suppress(OSError):
        numbers += [int(match[1]) for name in os.listdir(folder) if (match := pattern.match(name))]
    return 1 + max(numbers)


def save_new(folder: Path, name_of: Callable[[int], str], counter: int, data: bytes) -> Path:
    """Writes `data` to the first free name from `name_of(counter)` on; returns the path.

    Raises CascadeError that names the path where the folder is a file, not writable or full.
    """
    try:
        with writing.temporary_file(folder) as temporary:
            temporary.write_bytes(data)
            return writing.move_to_free(temporary, (folder / name_of(i) for i in itertools.count(counter)))
    except OSError as error:
        raise _cannot_save(folder / name_of(counter), error) from error
