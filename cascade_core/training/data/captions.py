"""Captions as they lie beside pictures: text files, and rows of metadata."""

from collections.abc import Mapping, Sequence
from typing import Any

from ...reading import encoding_of

SUFFIXES = (".txt", ".caption")  # of the picture's name; one caption a line
KEYS = ("text", "caption", "captions")  # in metadata.jsonl and in a tar's .json
MAX_BYTES = 1_000_000  # of a picture's text file; more is not a caption
MAX_CAPTIONS = 1_000  # of a picture
MAX_CHARACTERS = 10_000  # of a caption: about 2,500 tokens


class CaptionError(ValueError):
    """What is wrong with a picture's captions, in a few words; training goes on without it."""


def decoded(data: bytes) -> str:
    """A text file's text. Raises CaptionError where it is too long, or in another encoding."""
    if len(data) > MAX_BYTES:
        raise CaptionError(f"it has more than {MAX_BYTES:,} bytes")
    try:
        text = data.decode(encoding_of(data))
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # as UTF-16 without a mark has it
        raise CaptionError("it is not in UTF-8; save it so")
    return text


def caption_lines(text: str) -> tuple[str, ...]:
    """One caption a line; an empty file is the empty caption. Raises CaptionError as `checked`."""
    return checked([line for line in (line.strip() for line in text.splitlines()) if line] or [""])


def caption_values(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The captions of a row of metadata; empty where it has none. Raises CaptionError as `checked`."""
    for key in KEYS:
        value = row.get(key)
        if isinstance(value, str):
            return caption_lines(value)
        if isinstance(value, list) and value and all(isinstance(line, str) for line in value):
            return checked([line.strip() for line in value])
    return ()


def checked(captions: Sequence[str]) -> tuple[str, ...]:
    """Captions of a number and length that text encoders can take. Raises CaptionError for others."""
    if len(captions) > MAX_CAPTIONS:
        raise CaptionError(f"it has {len(captions):,} lines, and at most {MAX_CAPTIONS:,} are drawn from")
    longest = max(map(len, captions))
    if longest > MAX_CHARACTERS:
        raise CaptionError(f"it has {longest:,} characters, and at most {MAX_CHARACTERS:,} are read")
    try:
        "".join(captions).encode()
    except UnicodeEncodeError:
        raise CaptionError("it holds halves of characters (lone surrogates)") from None
    return tuple(captions)
