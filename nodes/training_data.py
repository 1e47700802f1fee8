"""What the training nodes read: a folder of pictures and tars, each file from where the host lets clients read."""

import os
from collections.abc import Iterator
from pathlib import Path

from ..cascade_core.errors import CascadeError, Interrupted, quoted
from .files import stamp
from .hosts import host

MOST_STAMPED = 10_000  # files; ComfyUI asks for the stamp before each prompt


def folder_path(name: str) -> Path:
    """The folder of that name. Raises CascadeError where there is none, or none for clients."""
    folder = host().data_path(name)
    if not os.path.isdir(folder):  # unlike Path.is_dir, False for a name that is too long
        raise CascadeError(
            f"The folder of training pictures {quoted(name)} does not exist; give a folder of pictures."
        )
    return folder


def check_links(name: str) -> None:
    """Raises CascadeError where a link in the folder leads to what is not for clients.

    Raises Interrupted where the host asks for it.
    """
    for entry in _below(folder_path(name)):
        if host().interrupted():
            raise Interrupted("The run was stopped.")
        if entry.is_symlink():
            host().data_path(entry.path)


def tar_files(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """The files of patterns such as `set/{00..12}.tar` or `set/*.tar`, in which neither braces nor stars lead up."""
    from ..cascade_core.training.data.tars import expand

    paths = expand([str(host().data_path(pattern)) for pattern in patterns])
    return tuple(str(host().data_path(str(path))) for path in paths)


def folder_stamp(name: str) -> str:
    """A text that changes when a file of the folder does; of a very large one when a file comes or goes."""
    try:
        folder = host().data_path(name)
    except CascadeError as error:
        return str(error)
    paths: list[Path] = []
    for entry in _below(folder):
        if len(paths) == MOST_STAMPED or host().interrupted():
            return f"{name} {folder.stat().st_mtime_ns}"
        paths.append(Path(entry.path))
    return stamp(sorted(paths))


def _below(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Everything in a folder and its subfolders, links followed; each folder once, whatever links lead to it."""
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
                    yield entry  # whoever looks may refuse it before it is entered
                    if entry.is_dir():
                        waiting.append(Path(entry.path))
        except OSError:  # what cannot be read is named by those who read pictures
            continue
