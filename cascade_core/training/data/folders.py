"""A folder of pictures, with captions beside them or in a metadata.jsonl, and with image prompts."""

import csv
import errno
import io
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from ...errors import CascadeError, printable, quoted
from ...reading import encoding_of, open_regular, regular_status
from .access import Access
from .captions import MAX_BYTES, SUFFIXES, CaptionError, caption_lines, caption_values, decoded
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
    mask_of,
)

METADATA, TABLE = "metadata.jsonl", "metadata.csv"
MAX_LINE = 1_000_000  # characters of a line of metadata
UNUSED_MASK = "a mask, by its name, and no caption; data.masks: beside makes use of it"
LEADS_OUT = "a link that leads out of the folders that may be read"


def folder_pictures(folder: Path, access: Access, companions: Companions = NONE_BESIDE) -> Listing:
    """Lists a folder's pictures; hidden files and folders, which begin with a dot, are left out."""
    if not os.path.isdir(folder):
        problem = "is a file" if os.path.exists(folder) else "does not exist"
        raise CascadeError(
            f"The folder of training pictures {printable(str(folder))} {problem}; give a folder of pictures."
        )
    access.permit(folder)
    folder = folder.resolve()
    masks = _masks_of_folder(companions.mask_folder, access)
    metadata: dict[str, tuple[str, ...]] = {}  # by path, from the metadata.jsonl of every folder read so far
    for found in _walk(folder, access):
        if isinstance(found, Skipped):
            yield found
            continue
        place, names = found
        for name, rows in ((TABLE, _csv_rows), (METADATA, _json_rows)):
            if name in names:
                metadata |= _read_metadata(Path(place, name), rows, access)
        yield from _pictures_in(place, folder, names, metadata, access, companions, masks)


def _walk(folder: Path, access: Access) -> Iterator[tuple[str, list[str]] | Skipped]:
    """Each folder with its files, sorted by name, parents first; links are followed, but never in circles."""
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [(str(folder), ())]  # path, parents' identities
    while waiting:
        place, above = waiting.pop()
        shown = Path(place).relative_to(folder).as_posix()
        try:
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in above:
                yield Skipped(shown, "a link to a folder above it")
                continue
            if access.leads_out(place):
                yield Skipped(shown, LEADS_OUT)
                continue
            names, folders = _names(place, access)
        except OSError as error:
            yield Skipped(shown, f"the folder cannot be read: {error.strerror}")
            continue
        yield place, sorted(names)
        above = (*above, (status.st_dev, status.st_ino))
        visible = [name for name in folders if not name.startswith(".")]
        waiting += [(os.path.join(place, name), above) for name in sorted(visible, reverse=True)]


def _names(place: str, access: Access) -> tuple[list[str], list[str]]:
    """Names of a folder's files and of its folders."""
    names, folders = [], []
    with os.scandir(place) as entries:
        for entry in entries:
            access.count(place)
            (folders if _is_folder(entry) else names).append(entry.name)
    return names, folders


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _masks_of_folder(folder: Path | None, access: Access) -> dict[str, PictureFile] | None:
    """A folder's pictures by their path within it, without extension; None where no folder is given."""
    if folder is None:
        return None
    access.permit(folder)
    if not os.path.isdir(folder):
        raise CascadeError(
            f"data.mask_folder {printable(str(folder))} is not a folder; give one of masks with the pictures' names."
        )
    folder, masks = folder.resolve(), {}
    for found in _walk(folder, access):
        place, names = found if not isinstance(found, Skipped) else ("", [])
        for name in names:
            if _suffix(name) in PICTURES and not name.startswith("."):
                with suppress(OSError):
                    file = PictureFile(*_file_fields(Path(place, name), folder, access))
                    masks.setdefault(file.name[: -len(Path(name).suffix)], file)
    return masks


def _pictures_in(
    place: str,
    folder: Path,
    names: list[str],
    metadata: Mapping[str, tuple[str, ...]],
    access: Access,
    companions: Companions,
    masks: Mapping[str, PictureFile] | None,
) -> Listing:
    visible = [name for name in names if not name.startswith(".")]
    pictures = [name for name in visible if _suffix(name) in PICTURES]
    caption_files = _caption_files(names, companions.caption_suffix)
    prompts = _image_prompts(pictures)
    stems = {Path(name).stem for name in pictures}
    mask_names = {
        picture: name
        for name in pictures
        if companions.masks == "beside" and (picture := mask_of(Path(name).stem)) in stems
    }
    passed_over = {name for names in (*prompts.values(), mask_names.values()) for name in names}
    for name in visible:
        shown = Path(place, name).relative_to(folder).as_posix()
        if _suffix(name) in NOT_READ:
            yield Skipped(shown, kind_not_read(_suffix(name)))
        if _suffix(name) not in PICTURES or name in passed_over:
            continue
        path = Path(place, name)
        captions, beside = metadata.get(str(path)), caption_files.get(path.stem)
        try:
            access.ask()
            file = _file_fields(path, folder, access)
            image_prompts = tuple(
                PictureFile(*_file_fields(Path(place, each), folder, access))
                for each in prompts.get(path.stem, ())
            )
            if not captions and beside:
                captions = _read_captions(Path(place, beside), access)
            mask = PictureFile(*file) if companions.masks == "alpha" else None
            if masks is not None:
                mask = masks.get(shown[: -len(path.suffix)])
            elif path.stem in mask_names:
                mask = PictureFile(*_file_fields(Path(place, mask_names[path.stem]), folder, access))
        except OSError as error:
            yield Skipped(shown, f"it cannot be read: {error.strerror}")
        except CaptionError as error:
            yield Skipped(shown, f"its caption {printable(str(beside))} cannot be read: {error}")
        else:
            if not captions and mask_of(path.stem) in stems:
                yield Skipped(shown, UNUSED_MASK)
            elif captions := captions or companions.own:
                yield TrainingPicture(*file, captions, image_prompts, mask=mask)
            else:
                yield Skipped(shown, "no caption")


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()


def _caption_files(names: list[str], only: str | None = None) -> dict[str, str]:
    """Caption files by name without extension; .txt takes precedence over .caption and .json, lower case over upper
    case.

    only: the single suffix to look for instead.
    """
    files: dict[str, str] = {}
    for suffix in [only.lower()] if only else reversed((*SUFFIXES, ".json")):
        files |= {Path(name).stem: name for name in names if _suffix(name) == suffix}
    return files


def _image_prompts(pictures: list[str]) -> dict[str, list[str]]:
    """{name of a picture, without extension: its image prompts in a folder, in the order of their numbers}."""
    stems = {Path(name).stem for name in pictures}
    numbered: dict[str, list[tuple[int, str]]] = {}
    for name in pictures:
        match = IMAGE_PROMPT.fullmatch(Path(name).stem)
        if match is not None and match[1] in stems:
            numbered.setdefault(match[1], []).append((int(match[2]), name))
    return {stem: [name for _, name in sorted(prompts)] for stem, prompts in numbered.items()}


def _file_fields(path: Path, folder: Path, access: Access) -> tuple[str, Path, int, int, int]:
    """The fields of `PictureFile` for a whole file. Raises OSError for a path that is not a file or may not be read."""
    if access.leads_out(path):
        raise PermissionError(errno.EACCES, LEADS_OUT)
    status = regular_status(path)
    return path.relative_to(folder).as_posix(), path, 0, status.st_size, status.st_mtime_ns


def _read_captions(path: Path, access: Access) -> tuple[str, ...]:
    """The captions of a text file. Raises CaptionError."""
    if access.leads_out(path):
        raise CaptionError(LEADS_OUT)
    try:
        with open_regular(path) as file:
            text = decoded(file.read(MAX_BYTES + 1))
    except OSError as error:
        raise CaptionError(error.strerror) from None
    if path.suffix.lower() != ".json":
        return caption_lines(text)
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        raise CaptionError("it is not JSON") from None
    return caption_values(row) if isinstance(row, dict) else ()


def _read_metadata(
    path: Path, rows: Callable[[TextIO, str, Access], Iterator[tuple[str, tuple[str, ...]]]], access: Access
) -> dict[str, tuple[str, ...]]:
    """Reads {path: captions} in the format of Hugging Face's image folders: `file_name` is relative to the file's
    folder.

    rows: yields (a picture's path, its captions) from the file's text.
    """
    if access.leads_out(path):
        raise CascadeError(f"{printable(str(path))} is {LEADS_OUT}; put the file itself there.")
    shown = printable(str(path))
    kind = "a table with commas" if path.name == TABLE else "JSON lines"
    try:
        with open_regular(path) as file:
            encoding = encoding_of(file.read(2))
            file.seek(0)
            lines = io.TextIOWrapper(file, encoding, newline="" if path.name == TABLE else None)
            return {
                os.path.normpath(path.parent / name): values for name, values in rows(lines, shown, access)
            }
    except (OSError, UnicodeError) as error:
        raise CascadeError(f"{shown} cannot be read ({error}); it must be {kind} in UTF-8.") from None


def _json_rows(lines: TextIO, shown: str, access: Access) -> Iterator[tuple[str, tuple[str, ...]]]:
    for number in itertools.count(1):
        access.ask()
        line = lines.readline(MAX_LINE)
        if not line:
            return
        if line.strip():
            yield _row(line, f"{shown}, line {number}")


def _csv_rows(lines: TextIO, shown: str, access: Access) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Rows of a table whose first line names its columns: file_name, and text or caption."""
    table = csv.DictReader(iter(lambda: lines.readline(MAX_LINE), ""), strict=True)
    try:
        if table.fieldnames is not None and "file_name" not in table.fieldnames:
            raise CascadeError(
                f"{shown}, line 1 names the columns {quoted(list(table.fieldnames))}; file_name and text are expected, "
                "with a comma between them."
            )
        for row in table:
            access.ask()
            yield _fields(row, f"{shown}, line {table.line_num}")
    except csv.Error as error:
        raise CascadeError(
            f"{shown}, line {table.line_num} is not of a table ({error}); mend the line."
        ) from None


def _row(line: str, where: str) -> tuple[str, tuple[str, ...]]:
    """(a picture's path, its captions) of a line of metadata. Raises CascadeError."""
    if len(line) == MAX_LINE:
        raise CascadeError(
            f"{where} has {MAX_LINE:,} characters or more; a line holds one picture's captions alone."
        )
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise _no_row(where) from None
    return _fields(row, where)


def _fields(row: Any, where: str) -> tuple[str, tuple[str, ...]]:
    try:
        return os.path.join(row["file_name"]), caption_values(row)
    except CaptionError as error:
        raise CascadeError(f"{where} cannot be trained on: {error}; mend the line.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _no_row(where) from None


def _no_row(where: str) -> CascadeError:
    return CascadeError(
        f'{where} is not as {{"file_name": "picture.png", "text": "its caption"}}; mend the line.'
    )
