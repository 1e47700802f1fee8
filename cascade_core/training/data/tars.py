"""Webdataset tars, read in place: members of one basename belong together (`0001.jpg`, `0001.txt`).

Nothing is extracted: the archive's headers say where each picture's bytes lie, and these are read when they are needed.
"""

import glob
import json
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ...errors import CascadeError
from .captions import SUFFIXES, caption_lines, caption_values
from .pictures import IMAGE_PROMPT, PICTURES, Listing, PictureFile, Skipped, TrainingPicture

MAX_CAPTION = 1_000_000  # bytes; more is not a caption


def expand(patterns: Iterable[str]) -> list[Path]:
    """The files of patterns: `data/*.tar`, or webdataset's `data/{0000..0012}.tar`."""
    paths: list[Path] = []
    for pattern in patterns:
        for plain in _braces(pattern):
            exact = Path(plain).expanduser()
            matches = [exact] if exact.exists() else sorted(map(Path, glob.glob(str(exact))))
            if not matches:
                raise CascadeError(
                    f"There is no tar {plain}; give webdataset tars by path or pattern, as data/*.tar."
                )
            paths += matches
    return paths


def _braces(pattern: str) -> list[str]:
    span = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if span is None:
        return [pattern]
    first, last = span.groups()
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    head, tail = pattern[: span.start()], pattern[span.end() :]
    return [whole for number in numbers for whole in _braces(head + number + tail)]


def tar_pictures(path: Path) -> Listing:
    """List a tar's pictures, in their order."""
    path = path.resolve()
    try:
        status = path.stat()
        groups, cut = _members(path, status.st_size)
        with path.open("rb") as file:
            for key, members in groups.items():
                suffix = next((suffix for suffix in PICTURES if suffix in members), None)
                if suffix is None:
                    continue
                name = f"{path.name}/{key}{suffix}"
                member = members[suffix]
                try:
                    captions = _captions(file, members)
                except (ValueError, RecursionError) as error:
                    yield Skipped(name, f"its caption cannot be read: {error}")
                    continue
                if captions:
                    prompts = [
                        PictureFile(
                            f"{path.name}/{key}{suffix}",
                            path,
                            each.offset_data,
                            each.size,
                            status.st_mtime_ns,
                        )
                        for suffix, each in _image_prompts(members)
                    ]
                    place = member.offset_data, member.size, status.st_mtime_ns
                    yield TrainingPicture(name, path, *place, captions, tuple(prompts))
                else:
                    yield Skipped(name, "no caption")
    except OSError as error:
        raise CascadeError(
            f"The tar {path} cannot be read ({error.strerror or error}); make it readable or leave it out."
        ) from None
    if cut:
        yield Skipped(path.name, f"the tar is damaged: {cut}")


def _members(path: Path, size: int) -> tuple[dict[str, dict[str, tarfile.TarInfo]], str]:
    """Plain files by basename and suffix, and what is wrong with the archive's end, if anything is.

    Links, devices and sparse files are passed over: what a name or a link points to is never opened.
    """
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    cut = ""
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isreg() or member.sparse is not None:
                    continue
                if member.offset_data + member.size > size:
                    cut = f"it ends within {member.name}"
                    break
                name = PurePosixPath(member.name).name
                stem, dot, suffix = name.partition(".")
                if stem:  # else hidden
                    key = member.name[: len(member.name) - len(dot + suffix)]
                    groups.setdefault(key, {})[dot + suffix.lower()] = member
    except tarfile.TarError as error:
        if not groups:
            raise CascadeError(
                f"{path} is no tar that can be read in place ({error}); a compressed one must be unpacked first "
                "(gunzip)."
            ) from None
        cut = str(error)
    return groups, cut


def _image_prompts(members: dict[str, tarfile.TarInfo]) -> list[tuple[str, tarfile.TarInfo]]:
    """Those of one basename's members that prompt for its picture (`.prompt0.png`), in the order of their numbers."""
    prompts = []
    for suffix, member in members.items():
        stem, dot, ending = suffix.rpartition(".")
        match = IMAGE_PROMPT.fullmatch(stem)
        if match is not None and not match[1] and dot + ending in PICTURES:
            prompts.append((int(match[2]), suffix, member))
    return [(suffix, member) for _, suffix, member in sorted(prompts, key=lambda each: each[:2])]


def _captions(file, members: dict[str, tarfile.TarInfo]) -> tuple[str, ...]:
    """The captions of one basename's members. Raises ValueError where a caption is not text, or is far too long."""
    for suffix in (*SUFFIXES, ".json"):
        member = members.get(suffix)
        if member is None:
            continue
        if member.size > MAX_CAPTION:
            raise ValueError(f"{member.size} bytes are no caption")
        file.seek(member.offset_data)
        text = file.read(member.size).decode("utf-8-sig")
        if suffix != ".json":
            return caption_lines(text)
        row = json.loads(text)
        if isinstance(row, dict) and (captions := caption_values(row)):
            return captions
    return ()
