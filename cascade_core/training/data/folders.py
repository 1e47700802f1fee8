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
    """List a folder's pictures; hidden files and folders, which begin with a dot, are left out."""
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise CascadeError(f"The folder of training pictures {folder} {problem}; give a folder of pictures.")
    folder = folder.resolve()
    metadata: dict[str, tuple[str, ...]] = {}  # by path, from every metadata.jsonl on the way down
    for place, below, names in os.walk(folder, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if METADATA in names:
            metadata |= _read_metadata(Path(place, METADATA))
        yield from _pictures_in(place, folder, sorted(names), metadata)


def _pictures_in(
    place: str, folder: Path, names: list[str], metadata: Mapping[str, tuple[str, ...]]
) -> Listing:
    beside = set(names)
    pictures = [name for name in names if Path(name).suffix.lower() in PICTURES and not name.startswith(".")]
    prompts = _image_prompts(pictures)
    prompt_names = {name for names in prompts.values() for name in names}
    for name in pictures:
        if name in prompt_names:
            continue
        path = Path(place, name)
        shown = path.relative_to(folder).as_posix()
        try:
            captions = metadata.get(str(path)) or _captions_beside(path, path.stem, beside)
            file = _file_fields(path, folder)
            image_prompts = tuple(
                PictureFile(*_file_fields(Path(place, each), folder)) for each in prompts.get(path.stem, ())
            )
        except (OSError, UnicodeDecodeError) as error:
            yield Skipped(shown, f"it or its caption cannot be read: {error}")
            continue
        if captions:
            yield TrainingPicture(*file, captions, image_prompts)
        else:
            yield Skipped(shown, "no caption")


def _image_prompts(pictures: list[str]) -> dict[str, list[str]]:
    """Which of a folder's pictures prompt for another, by its name without ending, in the order of their numbers."""
    stems = {Path(name).stem for name in pictures}
    numbered: dict[str, list[tuple[int, str]]] = {}
    for name in pictures:
        match = IMAGE_PROMPT.fullmatch(Path(name).stem)
        if match is not None and match[1] in stems:
            numbered.setdefault(match[1], []).append((int(match[2]), name))
    return {stem: [name for _, name in sorted(prompts)] for stem, prompts in numbered.items()}


def _file_fields(path: Path, folder: Path) -> tuple[str, Path, int, int, int]:
    """The fields of `PictureFile` for a whole file."""
    status = path.stat()
    return path.relative_to(folder).as_posix(), path, 0, status.st_size, status.st_mtime_ns


def _captions_beside(picture: Path, stem: str, names: set[str]) -> tuple[str, ...]:
    for suffix in SUFFIXES:
        if stem + suffix in names:
            return caption_lines(picture.with_name(stem + suffix).read_text(encoding="utf-8-sig"))
    return ()


def _read_metadata(path: Path) -> dict[str, tuple[str, ...]]:
    """Read path -> captions, as Hugging Face's image folders have it: `file_name` is relative to the file's folder."""
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
