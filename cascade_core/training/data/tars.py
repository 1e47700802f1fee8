"""Webdataset tars, read in place: members of one basename belong together (`0001.jpg`, `0001.txt`).

Nothing is extracted: the archive's headers give the position of each picture's bytes, which are read when needed.
"""

import fnmatch
import glob
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from ...errors import CascadeError, Interrupted, printable
from ...reading import open_regular
from .access import Access
from .captions import MAX_BYTES, SUFFIXES, caption_lines, caption_values, decoded
from .pictures import (
    IMAGE_PROMPT,
    NONE_BESIDE,
    NOT_READ,
    PICTURES,
    Companions,
    Listing,
    PictureFile,
    Skipped,
    TrainingPicture,
    kind_not_read,
)

MAX_TARS = 100_000
MAX_DIGITS = 12  # of a number in a pattern
MAX_HEADER = 65_536  # bytes of a member's own headers: a long name, times and owners


def expand(patterns: Iterable[str], access: Access | None = None) -> list[Path]:
    """The files of patterns: `data/*.tar`, or webdataset's `data/{0000..0012}.tar`.

    Raises CascadeError for no files, or for more than MAX_TARS.
    """
    access = access or Access()
    paths: list[Path] = []
    for pattern in patterns:
        for plain in map(os.path.expanduser, _braces(pattern)):
            access.ask()
            matches = [Path(plain)] if os.path.exists(plain) else _matches(plain, access)
            if not matches:
                raise CascadeError(
                    f"There is no tar {printable(plain)}; give webdataset tars by path or pattern, as data/*.tar."
                )
            paths += matches
            if len(paths) > MAX_TARS:
                raise _too_many(pattern)
    return paths


def _braces(pattern: str) -> Iterator[str]:
    """Expands a pattern's {0000..0012}, the first one varying slowest; the results are counted beforehand."""
    pieces = re.split(r"\{(\d+)\.\.(\d+)\}", pattern)  # text, first, last, text, first, last, …, text
    choices, count = [], 1
    for first, last in zip(pieces[1::3], pieces[2::3], strict=True):
        numbers = range(int(first[:MAX_DIGITS]), int(last[:MAX_DIGITS]) + 1)
        count *= len(numbers)
        if max(len(first), len(last)) > MAX_DIGITS or count > MAX_TARS:
            raise _too_many(pattern)
        if not numbers:
            raise CascadeError(
                f"The tars {printable(pattern)} count from {first} to {last}; give the smaller number first."
            )
        choices.append([str(number).zfill(len(first)) for number in numbers])
    for chosen in itertools.product(*choices):
        yield "".join(map("".join, zip(pieces[::3], (*chosen, ""), strict=True)))


def _too_many(pattern: str) -> CascadeError:
    return CascadeError(
        f"The tars {printable(pattern)} are more than {MAX_TARS:,} files; give fewer, each with more pictures."
    )


def _matches(pattern: str, access: Access) -> list[Path]:
    """The sorted files that match a pattern of *, ? and []: `glob.glob` with a count and the possibility to stop."""
    path = Path(pattern)
    places = [path.anchor]
    for part in path.parts[bool(path.anchor) :]:
        if glob.has_magic(part):
            places = [
                os.path.join(place, name)
                for place in places
                for name in _names(place, access)
                if fnmatch.fnmatch(name, part) and (part.startswith(".") or not name.startswith("."))
            ]
        else:
            places = [os.path.join(place, part) for place in places]
    return sorted(Path(place) for place in places if os.path.exists(place))


def _names(folder: str, access: Access) -> Iterator[str]:
    try:
        with os.scandir(folder or ".") as entries:
            for entry in entries:
                access.count(folder)
                yield entry.name
    except OSError:  # not a folder, or an unreadable one: no matches
        return


class Member(NamedTuple):
    """Position of a plain file's bytes in a tar."""

    offset: int
    size: int


def tar_pictures(path: Path, access: Access, companions: Companions = NONE_BESIDE) -> Listing:
    """Lists a tar's pictures, in their order."""
    access.permit(path)
    path = path.resolve()
    shown = printable(str(path))
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            groups, cut = _members(_Headers(file, status.st_size, access), path)
            for key, members in groups.items():
                access.ask()
                for suffix in members.keys() & NOT_READ:
                    yield Skipped(f"{path.name}/{key}{suffix}", kind_not_read(suffix))
                suffix = next((suffix for suffix in PICTURES if suffix in members), None)
                if suffix is None:
                    continue
                name = f"{path.name}/{key}{suffix}"
                try:
                    captions = _captions(file, members, companions.caption_suffix) or companions.own
                except (ValueError, RecursionError) as error:
                    yield Skipped(name, f"its caption cannot be read: {error}")
                    continue
                if not captions:
                    yield Skipped(name, "no caption")
                    continue
                mask = _mask(members, suffix, companions)
                prompts = [
                    PictureFile(f"{path.name}/{key}{each}", path, *members[each], status.st_mtime_ns)
                    for each in _image_prompts(members)
                ]
                yield TrainingPicture(
                    name,
                    path,
                    *members[suffix],
                    status.st_mtime_ns,
                    captions,
                    tuple(prompts),
                    mask=PictureFile(f"{path.name}/{key}{mask}", path, *members[mask], status.st_mtime_ns)
                    if mask is not None
                    else None,
                )
    except OSError as error:
        raise CascadeError(
            f"The tar {shown} cannot be read ({error.strerror or error}); make it readable or leave it out."
        ) from None
    if cut:
        yield Skipped(path.name, f"the tar is damaged: {cut}")


_MANY_DIGITS = re.compile(rb"\d{100}")  # tarfile before Python 3.12.6 would parse these for hours


class _Headers:
    """A tar's file object for tarfile, which refuses headers above MAX_HEADER bytes and positions beyond the end."""

    def __init__(self, file: BinaryIO, size: int, access: Access):
        self.file, self.size, self.access = file, size, access
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        self.access.ask()
        if size > MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        data = self.file.read(size)
        if _MANY_DIGITS.search(data):
            raise tarfile.ReadError("a header of digits")
        return data

    def seek(self, place: int) -> int:
        if not 0 <= place <= self.size:
            raise tarfile.ReadError("it ends early")
        return self.file.seek(place)


def _members(file: _Headers, path: Path) -> tuple[dict[str, dict[str, Member]], str]:
    """Plain files by basename and suffix, and the fault of a damaged end of the archive, or "".

    Links, devices and sparse files are skipped: the target of a link is never opened.
    """
    groups: dict[str, dict[str, Member]] = {}
    cut, last = "", -1
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as archive:  # pyright: ignore[reportArgumentType, reportCallIssue]
            while (member := archive.next()) is not None:
                archive.members.clear()  # unused, and grows with the tar
                file.access.count(path)
                if member.offset <= last or member.size < 0 or member.offset_data + member.size > file.size:
                    cut = f"it ends within {printable(member.name)}"
                    break
                last = member.offset
                if not member.isreg() or member.sparse is not None:
                    continue
                name = PurePosixPath(member.name).name
                stem, dot, suffix = name.partition(".")
                if stem:  # without a stem it is a hidden file
                    key = member.name[: len(member.name) - len(dot + suffix)]
                    groups.setdefault(key, {})[dot + suffix.lower()] = Member(member.offset_data, member.size)
    except (CascadeError, Interrupted, OSError):
        raise
    except Exception as error:  # tarfile lets any exception through from a damaged file
        if not groups:
            raise CascadeError(
                f"{printable(str(path))} is not a tar that can be read in place ({error}); a compressed one must be "
                "unpacked first (gunzip)."
            ) from None
        cut = str(error) or type(error).__name__
    return groups, cut


def _image_prompts(members: Mapping[str, Member]) -> list[str]:
    """Members of one basename that are image prompts (`.prompt0.png`), in the order of their numbers."""
    prompts = []
    for suffix in members:
        stem, dot, ending = suffix.rpartition(".")
        match = IMAGE_PROMPT.fullmatch(stem)
        if match is not None and not match[1] and dot + ending in PICTURES:
            prompts.append((int(match[2]), suffix))
    return [suffix for _, suffix in sorted(prompts)]


def _mask(members: Mapping[str, Member], picture: str, companions: Companions) -> str | None:
    """The member of one basename that is the picture's mask: itself, for its transparency, or `.mask.png`."""
    if companions.masks == "alpha":
        return picture
    masks = (suffix for suffix in members if suffix.startswith(".mask.") and suffix[5:] in PICTURES)
    return next(masks, None) if companions.masks == "beside" else None


def _captions(file: BinaryIO, members: Mapping[str, Member], only: str | None = None) -> tuple[str, ...]:
    """The captions of one basename's members. Raises ValueError where a caption is not text, or is far too long."""
    for suffix in [only.lower()] if only else (*SUFFIXES, ".json"):
        member = members.get(suffix)
        if member is None:
            continue
        file.seek(member.offset)
        text = decoded(file.read(min(member.size, MAX_BYTES + 1)))
        if suffix != ".json":
            return caption_lines(text)
        row = json.loads(text)
        if isinstance(row, dict) and (captions := caption_values(row)):
            return captions
    return ()
