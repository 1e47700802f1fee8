"""Files written whole or not at all, by however many threads, processes and machines share a folder.

Data goes to a temporary file with a random name in the target's folder, which is linked or renamed once it is on
disk. The name has no process id, since every container's first process is number 1. A killed process leaves its
temporary file, `.0123456789abcdef.part`; the next run that checks the folder removes such files older than a day.
"""

import argparse
import errno
import hashlib
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.part")
WINDOWS = os.name == "nt"
ATTEMPTS, PAUSE = 10, 0.1  # seconds between them: `_replace`
_DAY = 24 * 60 * 60  # seconds; no file is written for so long without a byte arriving


@contextmanager
def temporary_file(folder: Path) -> Iterator[Path]:
    """A new empty file in `folder` (made if need be), which nobody else writes; removed at the end if still there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{secrets.token_hex(8)}.part"
    try:
        path.open("xb").close()
        yield path
    finally:
        with suppress(OSError):  # the folder cannot be entered: then nothing was written there either
            path.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path, overwrite: bool = True) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place at the end of the block.

    An exception, also an interruption, leaves what was at `path` as it was. Raises OSError where that fails or `path`
    is something other than a file (a folder, /dev/null), and FileExistsError for a file that may not be overwritten.
    """
    _check_kind(path)
    with temporary_file(path.parent) as temporary:
        yield temporary
        if overwrite:
            flush(temporary)
            _replace(temporary, path)
        else:
            move_to_free(temporary, [path])


def _replace(temporary: Path, path: Path) -> None:
    """Puts a file in another's place.

    Windows refuses it while anybody has that one open, such as a virus scanner for a moment, or maps it into memory.
    """
    for attempt in range(ATTEMPTS):
        try:
            os.replace(temporary, path)
            return
        except PermissionError:
            if not WINDOWS or attempt == ATTEMPTS - 1:
                raise
            time.sleep(PAUSE)


def write_file(path: Path, data: str | bytes) -> None:
    """Replaces a file by these bytes, or this text in UTF-8."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def move_to_free(temporary: Path, names: Iterable[Path]) -> Path:
    """Moves a written file to the first of `names` that is free, overwriting nothing; returns that name."""
    flush(temporary)
    for target in names:
        try:
            os.link(temporary, target)
        except FileExistsError:
            # Otherwise a network drive lost its first answer and sent the request again.
            if temporary.stat().st_nlink == 1:
                continue
        except (OSError, AttributeError):  # no hard links, or an error that moving will meet too
            if not _moved(temporary, target):
                continue
        return target
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(temporary.parent))


def _moved(temporary: Path, target: Path) -> bool:
    """Moves a file where the file system has no hard links; False if the name is taken.

    The name is reserved by a hidden file named after it, so that a kill in between leaves no empty file at `target`.
    """
    digest = hashlib.sha256(os.fsencode(target.name.casefold())).hexdigest()
    reservation = target.with_name(f".{digest[:16]}.part")
    try:
        reservation.open("xb").close()
    except FileExistsError:
        return False
    try:
        if os.path.lexists(target):
            return False
        os.rename(temporary, target)
        return True
    except FileExistsError:  # Windows does not replace it: somebody else has taken the name since
        return False
    finally:
        reservation.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Brings a file's bytes to the disk, so that a name never stands for a file that a power cut would empty."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def check_folder(folder: Path) -> None:
    """Raises OSError unless files can be made in `folder`, or it can be made; leaves nothing behind.

    Called before the work, whose result would be lost if it could not be saved. Removes files left by killed processes.
    """
    _check_names(folder)


def check_file(path: Path) -> None:
    """Raises OSError unless a file can be written at `path`, in place of one that is there; as `check_folder`."""
    _check_kind(path)
    _check_names(path.parent, path.name)


def _check_kind(path: Path) -> None:
    """Raises OSError for a path that a file must not replace: a folder or a device, or a link to one."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))


def output_file(text: str) -> Path:
    """The path of an output file, checked to be writable before the work; for argparse's `type`."""
    try:
        check_file(Path(text))
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written ({error.strerror})") from error
    return Path(text)


def _check_names(folder: Path, *names: str) -> None:
    """Raises OSError unless files with these names can be made in a folder, which need not exist yet."""
    parents = [folder, *folder.parents]
    ancestor = next((parent for parent in parents if os.path.lexists(parent)), parents[-1])
    for name in (*folder.parts[len(ancestor.parts) :], *names):
        try:
            os.stat(ancestor / name)
        except FileNotFoundError:
            continue
        except ValueError as error:  # NUL, or a surrogate
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(folder)) from error
    tempfile.TemporaryFile(dir=ancestor).close()
    _sweep(folder)


def _sweep(folder: Path) -> None:
    """Removes the temporary files of killed processes."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _TEMPORARY.fullmatch(entry.name):
                with suppress(OSError):  # another process removed it
                    if time.time() - entry.stat(follow_symlinks=False).st_mtime > _DAY:
                        os.unlink(entry.path)
