"""Where training pictures and their captions come from: a folder with its subfolders, and webdataset tars."""

import glob
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CascadeError

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
CAPTIONS = (".txt", ".caption")  # of the picture's name; one caption a line
METADATA = "metadata.jsonl"
CAPTION_KEYS = ("text", "caption", "captions")  # in metadata.jsonl and in a tar's .json


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture's bytes within a file, and what is said of it."""

    name: str  # for people: its path within the folder, or the tar's and its own
    path: Path  # the file that holds it
    offset: int  # bytes
    length: int
    stamp: int  # when the file was last changed, in nanoseconds
    captions: tuple[str, ...]  # at least one

    @property
    def identity(self) -> str:
        """Changes where the picture may have changed."""
        return f"{self.path}\n{self.offset}\n{self.length}\n{self.stamp}"

    def read(self, at_most: int | None = None) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.length if at_most is None else min(at_most, self.length))


@dataclass(frozen=True, slots=True)
class Skipped:
    """A picture that is left out, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


Found = Iterator[Picture | Skipped]


def find_pictures(folder: str | Path | None, tars: Sequence[str]) -> tuple[list[Picture], list[Skipped]]:
    """Every picture with a caption in the folder and its subfolders, by name, and then in the tars, in their order.

    tars: paths or patterns such as `data/*.tar`. Raises CascadeError where nothing can be trained on.
    """
    from .tars import tar_pictures

    found: list[Picture | Skipped] = []
    if folder is not None:
        found += folder_pictures(Path(folder))
    for pattern in tars:
        paths = sorted(glob.glob(str(Path(pattern).expanduser())))
        if not paths:
            raise CascadeError(
                f"There is no tar {pattern}; give webdataset tars by path or pattern, as data/*.tar."
            )
        for path in paths:
            found += tar_pictures(Path(path))
    pictures = [each for each in found if isinstance(each, Picture)]
    skipped = [each for each in found if isinstance(each, Skipped)]
    if not pictures:
        raise _nothing(" and ".join(str(place) for place in (folder, *tars) if place), skipped)
    return pictures, skipped


def _nothing(places: str, skipped: list[Skipped]) -> CascadeError:
    if not skipped:
        return CascadeError(
            f"{places} holds no pictures; {', '.join(PICTURES)} with captions beside them are expected."
        )
    return CascadeError(
        f"{places} holds {len(skipped)} pictures, but none to train on, such as {skipped[0]}. Put a caption "
        f"into a text file of the picture's name ({skipped[0].name.rsplit('.', 1)[0]}.txt), or into {METADATA}; an "
        "empty text file trains without words."
    )


def caption_lines(text: str) -> tuple[str, ...]:
    """One caption a line; an empty file is the empty caption."""
    return tuple(line for line in (line.strip() for line in text.splitlines()) if line) or ("",)


def caption_values(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The captions of a row of metadata; none where it holds none."""
    for key in CAPTION_KEYS:
        value = row.get(key)
        if isinstance(value, str):
            return caption_lines(value)
        if isinstance(value, list) and value and all(isinstance(line, str) for line in value):
            return tuple(line.strip() for line in value)
    return ()


def folder_pictures(folder: Path) -> Found:
    """A folder's pictures; what is hidden (begins with a dot) is left alone."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise CascadeError(f"The folder of training pictures {folder} {what}; give a folder of pictures.")
    folder = folder.resolve()
    told: dict[str, tuple[str, ...]] = {}  # by path, from every metadata.jsonl on the way down
    for place, below, names in os.walk(folder, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if METADATA in names:
            told |= _read_metadata(Path(place, METADATA))
        yield from _pictures_in(place, folder, sorted(names), told)


def _pictures_in(place: str, folder: Path, names: list[str], told: Mapping[str, tuple[str, ...]]) -> Found:
    known = set(names)
    for name in names:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() not in PICTURES or name.startswith("."):
            continue
        path = Path(place, name)
        shown = path.relative_to(folder).as_posix()
        try:
            captions = told.get(str(path)) or _captions_beside(path, stem, known)
            status = path.stat()
        except (OSError, UnicodeDecodeError) as error:
            yield Skipped(shown, f"it or its caption cannot be read: {error}")
            continue
        if captions:
            yield Picture(shown, path, 0, status.st_size, status.st_mtime_ns, captions)
        else:
            yield Skipped(shown, "no caption")


def _captions_beside(picture: Path, stem: str, known: set[str]) -> tuple[str, ...]:
    for suffix in CAPTIONS:
        if stem + suffix in known:
            return caption_lines(picture.with_name(stem + suffix).read_text(encoding="utf-8-sig"))
    return ()


def _read_metadata(path: Path) -> dict[str, tuple[str, ...]]:
    """path -> captions, as Hugging Face's image folders have it: `file_name` is relative to the file's folder."""
    captions = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CascadeError(f"{path} cannot be read ({error}); it must be JSON lines in UTF-8.") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            captions[os.path.normpath(path.parent / row["file_name"])] = caption_values(row)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise CascadeError(
                f'{path}, line {number} is not as {{"file_name": "picture.png", "text": "its caption"}}; mend the line.'
            ) from None
    return captions
