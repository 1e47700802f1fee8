"""A folder of pictures, with captions beside them or in a metadata.jsonl, and with pictures that prompt for them."""

import errno
import io
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from ...errors import CascadeError, printable
from ...reading import encoding_of, open_regular, regular_status
from .access import Access
from .captions import MAX_BYTES, SUFFIXES, CaptionError, caption_lines, caption_values, decoded
from .pictures import (
    IMAGE_PROMPT,
    NOT_READ,
    PICTURES,
    Listing,
    PictureFile,
    Skipped,
    TrainingPicture,
    kind_not_read,
)

METADATA = "metadata.jsonl"
MAX_LINE = 1_000_000  # characters of a line of metadata
LEADS_OUT = "a link that leads out of the folders that may be read"


def folder_pictures(folder: Path, access: Access) -> Listing:
    """List a folder's pictures; hidden files and folders, which begin with a dot, are left out."""
    if not os.path.isdir(folder):
        problem = "is a file" if os.path.exists(folder) else "does not exist"
        raise CascadeError(
            f"The folder of training pictures {printable(str(folder))} {problem}; give a folder of pictures."
        )
    access.permit(folder)
    folder = folder.resolve()
    metadata: dict[str, tuple[str, ...]] = {}  # by path, from every metadata.jsonl on the way down
    for found in _walk(folder, access):
        if isinstance(found, Skipped):
            yield found
            continue
        place, names = found
        if METADATA in names:
            metadata |= _read_metadata(Path(place, METADATA), access)
        yield from _pictures_in(place, folder, names, metadata, access)


def _walk(folder: Path, access: Access) -> Iterator[tuple[str, list[str]] | Skipped]:
    """Each folder with its files, by name, the upper one first; links are followed, but never in circles."""
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [(str(folder), ())]  # path, the folders above it
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


def _pictures_in(
    place: str, folder: Path, names: list[str], metadata: Mapping[str, tuple[str, ...]], access: Access
) -> Listing:
    visible = [name for name in names if not name.startswith(".")]
    pictures = [name for name in visible if _suffix(name) in PICTURES]
    caption_files = _caption_files(names)
    prompts = _image_prompts(pictures)
    prompt_names = {name for names in prompts.values() for name in names}
    for name in visible:
        shown = Path(place, name).relative_to(folder).as_posix()
        if _suffix(name) in NOT_READ:
            yield Skipped(shown, kind_not_read(_suffix(name)))
        if _suffix(name) not in PICTURES or name in prompt_names:
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
        except OSError as error:
            yield Skipped(shown, f"it cannot be read: {error.strerror}")
        except CaptionError as error:
            yield Skipped(shown, f"its caption {printable(str(beside))} cannot be read: {error}")
        else:
            yield (
                TrainingPicture(*file, captions, image_prompts) if captions else Skipped(shown, "no caption")
            )


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()


def _caption_files(names: list[str]) -> dict[str, str]:
    """Text files by their name without ending; .txt goes before .caption, and lower case before upper."""
    files: dict[str, str] = {}
    for suffix in reversed(SUFFIXES):
        files |= {Path(name).stem: name for name in names if _suffix(name) == suffix}
    return files


def _image_prompts(pictures: list[str]) -> dict[str, list[str]]:
    """Which of a folder's pictures prompt for another, by its name without ending, in the order of their numbers."""
    stems = {Path(name).stem for name in pictures}
    numbered: dict[str, list[tuple[int, str]]] = {}
    for name in pictures:
        match = IMAGE_PROMPT.fullmatch(Path(name).stem)
        if match is not None and match[1] in stems:
            numbered.setdefault(match[1], []).append((int(match[2]), name))
    return {stem: [name for _, name in sorted(prompts)] for stem, prompts in numbered.items()}


def _file_fields(path: Path, folder: Path, access: Access) -> tuple[str, Path, int, int, int]:
    """The fields of `PictureFile` for a whole file. Raises OSError for what is not a file, or may not be read."""
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
            return caption_lines(decoded(file.read(MAX_BYTES + 1)))
    except OSError as error:
        raise CaptionError(error.strerror) from None


def _read_metadata(path: Path, access: Access) -> dict[str, tuple[str, ...]]:
    """Read path -> captions, as Hugging Face's image folders have it: `file_name` is relative to the file's folder."""
    if access.leads_out(path):
        raise CascadeError(f"{printable(str(path))} is {LEADS_OUT}; put the file itself there.")
    captions: dict[str, tuple[str, ...]] = {}
    shown = printable(str(path))
    try:
        with open_regular(path) as file:
            encoding = encoding_of(file.read(2))
            file.seek(0)
            lines = io.TextIOWrapper(file, encoding)
            for number in itertools.count(1):
                access.ask()
                line = lines.readline(MAX_LINE)
                if not line:
                    break
                if line.strip():
                    name, values = _row(line, f"{shown}, line {number}")
                    captions[os.path.normpath(path.parent / name)] = values
    except (OSError, UnicodeError) as error:
        raise CascadeError(f"{shown} cannot be read ({error}); it must be JSON lines in UTF-8.") from None
    return captions


def _row(line: str, where: str) -> tuple[str, tuple[str, ...]]:
    """(a picture's path, its captions) of a line of metadata. Raises CascadeError."""
    if len(line) == MAX_LINE:
        raise CascadeError(
            f"{where} has {MAX_LINE:,} characters or more; a line holds one picture's captions alone."
        )
    try:
        row = json.loads(line)
        return os.path.join(row["file_name"]), caption_values(row)
    except CaptionError as error:
        raise CascadeError(f"{where} cannot be trained on: {error}; mend the line.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CascadeError(
            f'{where} is not as {{"file_name": "picture.png", "text": "its caption"}}; mend the line.'
        ) from None
