"""Journal of a batch: lines of JSON beside its pictures, one for each row, written before the row's pictures.

A line claims the names of a row's pictures. So a row is done when its line and all its pictures exist, even after a
kill at any time: pictures without a line do not belong to the batch, and those that a line claims are replaced only
by that row.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ...cascade_core.errors import CascadeError, printable
from ...cascade_core.file_names import inside
from ...cascade_core.writing import write_file
from .work import Job, Outcome

Record = dict[str, Any]


class Journal:
    """`batch.jsonl` in a folder or `batch.3-of-8.jsonl` of a shard; reads all in the folder, writes one."""

    def __init__(self, folder: Path, shard: tuple[int, int] | None = None):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        part = f".{shard[0]}-of-{shard[1]}" if shard else ""
        self.path = path = folder / f"batch{part}.jsonl"
        self.file = path.open("ab+")
        self._lock(path)
        self._end_line()
        self.records: dict[str, Record] = {}
        self.owners: dict[str, str] = {}  # picture's name -> row's name
        self.read()

    def read(self) -> None:
        """Reads all journals of the folder, including lines that other processes have added."""
        for path in sorted(self.folder.glob("batch*.jsonl")):
            for record in _records(path):
                self._enter(record)

    def _enter(self, record: Record) -> None:
        self.records[record["name"]] = record
        for picture in record["pictures"]:
            self.owners[picture] = record["name"]

    def pictures(self, name: str) -> list[Path]:
        """Existing pictures of a row."""
        listed = self.records.get(name, {"pictures": []})["pictures"]
        return [path for picture in listed if os.path.isfile(path := self.folder / picture)]

    def is_done(self, job: Job) -> bool:
        """Whether all of a row's pictures exist. Raises CascadeError for other pictures under its name."""
        if job.name not in self.records and os.path.lexists(self.folder / f"{job.name}.png"):
            self.read()  # another process may have made it since
        record, there = self.records.get(job.name), self.pictures(job.name)
        if record is None:
            self._check_free(job, [self.folder / f"{job.name}.png"])
            return False
        if there and record["digest"] != job.digest:
            raise CascadeError(
                f"{there[0]} was made under this name with other values or another graph; give the row another "
                "name, or delete that picture."
            )
        return bool(there) and len(there) == len(record["pictures"])

    def save(self, job: Job, outcome: Outcome) -> list[Path]:
        """Writes a row's line, then its pictures. Raises CascadeError for a name that is taken.

        If another process has made the row since, its pictures are kept.
        """
        names = _names(job, outcome)
        paths = [self.folder / name for name in names]
        if any(name not in self.owners and path.exists() for name, path in zip(names, paths, strict=True)):
            self.read()
            if self.is_done(job):
                return paths
        self._check_free(job, paths)
        record = {"name": job.name, "digest": job.digest, "pictures": names}
        with self._named():
            self._write({**record, "seconds": round(outcome.seconds, 3), "worker": outcome.worker})
            self._enter(record)
            for path, picture in zip(paths, outcome.pictures, strict=True):
                write_file(path, picture.content)
        return paths

    def fail(self, name: str, error: str) -> None:
        """Records why a row could not be made. The row is tried again in the next run of the batch."""
        with self._named():
            self._write({"name": name, "error": error})

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Names the folder in an error of the system that names no file, such as a full disk's."""
        try:
            yield
        except OSError as error:
            error.filename = error.filename or str(self.folder)
            raise

    def _check_free(self, job: Job, paths: list[Path]) -> None:
        for path in paths:
            name = path.relative_to(self.folder).as_posix()
            for parent in path.parents[: name.count("/")]:
                if os.path.lexists(parent) and not parent.is_dir():
                    raise CascadeError(
                        f"{parent} is a file, so no picture can be saved in it; give the row another name."
                    )
            if inside(self.folder, name) is None:
                raise CascadeError(f"{path} leads out of the folder over a link; give the row another name.")
            owner = self.owners.get(name)
            if owner != job.name and os.path.lexists(path):
                whose = f"the row {owner}'s" if owner else "not of this batch"
                raise CascadeError(f"{path} is there already and is {whose}; give the row another name.")

    def _write(self, record: Record) -> None:
        if not (self.path.exists() and os.path.samestat(self.path.stat(), os.fstat(self.file.fileno()))):
            raise CascadeError(
                f"{printable(str(self.path))} was removed while the batch was recording in it, so the batch ends; "
                "the same command makes what is missing."
            )
        self.file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        self.file.flush()
        with suppress(OSError):  # some file systems cannot; a lost line only costs one row's time
            os.fsync(self.file.fileno())

    def _end_line(self) -> None:
        """Ends a line that a kill cut off."""
        if self.file.seek(0, os.SEEK_END):
            self.file.seek(-1, os.SEEK_END)
            if self.file.read(1) != b"\n":
                self.file.write(b"\n")

    def _lock(self, path: Path) -> None:
        if not _locked(self.file):
            raise CascadeError(
                f"Another `cascade batch` is writing {printable(str(path))}; wait for it, or give each a --shard."
            )

    def close(self) -> None:
        with suppress(OSError):  # a line that the disk has no room for, which ended the batch
            self.file.close()


def _names(job: Job, outcome: Outcome) -> list[str]:
    """Names of a row's pictures: the row's, with numbers of node and picture where there are several."""
    of_saver = Counter(picture.node_id for picture in outcome.pictures)
    numbers: Counter[str] = Counter()
    names = []
    for picture in outcome.pictures:
        name, saver = job.name, picture.node_id
        numbers[saver] += 1
        if len(job.savers) > 1:
            name += f"_{job.savers.index(saver) + 1}"
        if of_saver[saver] > 1:
            name += f"_{numbers[saver]}"
        names.append(name + picture.suffix)
    return names


def _records(path: Path) -> Iterator[Record]:
    """The records of rows that are done, without a line that a kill cut off."""
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if (
                isinstance(record, dict)
                and isinstance(record.get("name"), str)
                and isinstance(record.get("digest"), str)
                and isinstance(record.get("pictures"), list)
                and all(isinstance(picture, str) for picture in record["pictures"])
            ):
                yield record


def _locked(file: BinaryIO) -> bool:
    """Locks a file for this process; True also where there are no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network drives
        return True
    return True
