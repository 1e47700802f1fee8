"""A folder of pictures, with captions beside them or in a metadata.jsonl, and with pictures that prompt for them."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from ...errors import CascadeError
from .captions import SUFFIXES, caption_lines, caption_values
from .pictures import IMAGE_PROMPT, PICTURES, Listing, PictureFile, Skipped, TrainingPicture

METADATA = "metadata.jsonl"


def folder_pictures(folder: Path) -> Listing:
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


def _pictures_in(place: str, folder: Path, names: list[str], told: Mapping[str, tuple[str, ...]]) -> Listing:
    known = set(names)
    pictures = [name for name in names if Path(name).suffix.lower() in PICTURES and not name.startswith(".")]
    prompts = _image_prompts(pictures)
    prompting = {name for of_one in prompts.values() for name in of_one}
    for name in pictures:
        if name in prompting:
            continue
        path = Path(place, name)
        shown = path.relative_to(folder).as_posix()
        try:
            captions = told.get(str(path)) or _captions_beside(path, path.stem, known)
            where = _where(path, folder)
            shown_with = tuple(
                PictureFile(*_where(Path(place, each), folder)) for each in prompts.get(path.stem, ())
            )
        except (OSError, UnicodeDecodeError) as error:
            yield Skipped(shown, f"it or its caption cannot be read: {error}")
            continue
        if captions:
            yield TrainingPicture(*where, captions, shown_with)
        else:
            yield Skipped(shown, "no caption")


def _image_prompts(pictures: list[str]) -> dict[str, list[str]]:
    """Which of a folder's pictures prompt for another, by its name without ending, in the order of their numbers."""
    stems = {Path(name).stem for name in pictures}
    numbered: dict[str, list[tuple[int, str]]] = {}
    for name in pictures:
        of = IMAGE_PROMPT.fullmatch(Path(name).stem)
        if of is not None and of[1] in stems:
            numbered.setdefault(of[1], []).append((int(of[2]), name))
    return {stem: [name for _, name in sorted(found)] for stem, found in numbered.items()}


def _where(path: Path, folder: Path) -> tuple[str, Path, int, int, int]:
    """What `PictureFile` says of a file of its own."""
    status = path.stat()
    return path.relative_to(folder).as_posix(), path, 0, status.st_size, status.st_mtime_ns


def _captions_beside(picture: Path, stem: str, known: set[str]) -> tuple[str, ...]:
    for suffix in SUFFIXES:
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
