"""A training node's folder: its path, and a stamp that shows changes."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ..cascade_core.errors import CascadeError, quoted
from .files import stamp
from .hosts import host

MOST_STAMPED = 10_000  # files; ComfyUI asks for the stamp before each prompt


def folder_path(name: str) -> Path:
    """The folder of that name. Raises CascadeError where it does not exist, or where clients must not read it."""
    folder = host().data_path(name)
    if not os.path.isdir(folder):  # unlike Path.is_dir, False for a name that is too long
        raise CascadeError(
            f"The folder of training pictures {quoted(name)} does not exist; give a folder of pictures."
        )
    return folder


def folder_stamp(name: str) -> str:
    """A text that changes when a file in the folder does; in a very large folder, when a file is added or removed."""
    try:
        folder = host().data_path(name)
    except CascadeError as error:
        return str(error)
    paths: list[Path] = []
    for path in _below(folder, host().data_check() or (lambda path: None)):
        if len(paths) == MOST_STAMPED or host().interrupted():
            return f"{name} {folder.stat().st_mtime_ns}"
        paths.append(path)
    return hashlib.blake2b(
        stamp(sorted(paths)).encode("utf-8", "surrogateescape"), digest_size=16
    ).hexdigest()


def _below(folder: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """All paths in a folder and its subfolders; follows links that `check` allows, and visits each folder once."""
    waiting, entered = [folder], set[tuple[int, int]]()
    while waiting:
        place = waiting.pop()
        try:
            status = place.stat()
            if (identity := (status.st_dev, status.st_ino)) in entered:
                continue
            entered.add(identity)
            with os.scandir(place) as entries:
                for entry in entries:
                    path = Path(entry.path)
                    if entry.is_symlink() and not _may(check, path):
                        continue
                    yield path
                    if entry.is_dir():
                        waiting.append(path)
        except OSError:  # unreadable files are reported when pictures are read
            continue


def _may(check: Callable[[Path], None], link: Path) -> bool:
    try:
        check(Path(os.path.realpath(link)))
    except CascadeError:
        return False
    return True
