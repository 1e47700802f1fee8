"""Captions as they lie beside pictures: text files, and rows of metadata."""

from collections.abc import Mapping
from typing import Any

SUFFIXES = (".txt", ".caption")  # of the picture's name; one caption a line
KEYS = ("text", "caption", "captions")  # in metadata.jsonl and in a tar's .json


def caption_lines(text: str) -> tuple[str, ...]:
    """One caption a line; an empty file is the empty caption."""
    return tuple(line for line in (line.strip() for line in text.splitlines()) if line) or ("",)


def caption_values(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The captions of a row of metadata; empty where it has none."""
    for key in KEYS:
        value = row.get(key)
        if isinstance(value, str):
            return caption_lines(value)
        if isinstance(value, list) and value and all(isinstance(line, str) for line in value):
            return tuple(line.strip() for line in value)
    return ()
