"""Captions beside pictures: text files, and rows of metadata."""

import hashlib
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from ...reading import encoding_of
from ..settings import DataSettings

SUFFIXES = (".txt", ".caption")  # of the picture's name; one caption a line
KEYS = ("text", "caption", "captions")  # in metadata.jsonl and in a tar's .json
MAX_BYTES = 1_000_000  # of a picture's text file; more is not a caption
MAX_CAPTIONS = 1_000  # of a picture
MAX_CHARACTERS = 10_000  # of a caption: about 2,500 tokens


class CaptionError(ValueError):
    """A fault in a picture's captions, in a few words; training goes on without the picture."""


def decoded(data: bytes) -> str:
    """A text file's text. Raises CaptionError where it is too long, or in another encoding."""
    if len(data) > MAX_BYTES:
        raise CaptionError(f"it has more than {MAX_BYTES:,} bytes")
    try:
        text = data.decode(encoding_of(data))
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # as in UTF-16 without a byte order mark
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


def trained_captions(captions: Sequence[str], settings: DataSettings, number: int = -1) -> tuple[str, ...]:
    """The captions that a picture is trained with: variants of its own by the settings, after the trigger.

    Variants depend on the caption and the settings alone, so that all machines have the same, and each is encoded once.
    number: of the picture's set in data.sets; -1: none.
    """
    own = settings.sets[number].trigger if number >= 0 else None
    trigger = settings.trigger if own is None else own
    separator, varied = settings.tag_separator, settings.shuffle_tags or settings.tag_dropout > 0
    if not (varied or trigger):
        return tuple(captions)
    trained: dict[str, None] = {}
    for caption in captions:
        for variant in range(settings.caption_variants if varied else 1):
            text = _varied(caption, settings, variant) if varied else caption
            glue = f"{separator.strip()} " if text else ""
            trained.setdefault(f"{trigger.strip()}{glue}{text}" if trigger.strip() else text)
    return tuple(trained)


def _varied(caption: str, settings: DataSettings, variant: int) -> str:
    """A variant of a caption: the first tags unchanged, the others shuffled and some of them left out."""
    tags = [tag.strip() for tag in caption.split(settings.tag_separator) if tag.strip()]
    digest = hashlib.blake2b(f"{variant}\n{caption}".encode(), digest_size=8).digest()
    random = Random(int.from_bytes(digest, "big"))
    kept, others = tags[: settings.keep_tags], tags[settings.keep_tags :]
    if settings.shuffle_tags:
        random.shuffle(others)
    others = [tag for tag in others if random.random() >= settings.tag_dropout]
    return f"{settings.tag_separator.strip()} ".join([*kept, *others])
