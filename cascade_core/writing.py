"""Files written whole or not at all, by however many threads, processes and machines share a folder.

What is written goes to a temporary file of a random name beside its place, and is linked or renamed when it is on
the disk. A process id is no name: each container's first process is number 1.
"""

import errno
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EINVAL}


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
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place at the end of the block.

    An exception, also an interruption, leaves what was at `path` as it was. Raises OSError where that fails.
    """
    with temporary_file(path.parent) as temporary:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)


def move_to_free(temporary: Path, names: Iterable[Path]) -> Path:
    """Move a written file to the first of `names` that is free, overwriting nothing; returns that name."""
    flush(temporary)
    for target in names:
        try:
            os.link(temporary, target)
        except FileExistsError:
            continue
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if not _moved(temporary, target):
                continue
        return target
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(temporary.parent))


def _moved(temporary: Path, target: Path) -> bool:
    """Move a file where the file system has no hard links; False if the name is taken."""
    try:
        target.open("xb").close()  # reserves the name
    except FileExistsError:
        return False
    try:
        os.replace(temporary, target)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return True


def flush(path: Path) -> None:
    """Bring a file's bytes to the disk, so that a name never stands for a file that a power cut would empty."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
