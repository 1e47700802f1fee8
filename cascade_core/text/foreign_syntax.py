"""Recognises prompt syntax of other programs, which is read as plain words here, and says what to do instead."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from ..errors import quoted

ADVICE = {
    "lora": "is read as words; a LoRA is applied by Cascade LoRA Apply, or by add_lora in Python",
    "break": "is read as a word; prompts of any length are cut into parts by themselves, so leave it out",
    "schedule": (
        "is read as words; for a prompt that changes during the steps combine two of them, each in its range of steps "
        "(ComfyUI's ConditioningSetTimestepRange)"
    ),
    "choice": "is read as words; write the one that you want, or queue a prompt for each",
}

LORA, BREAK = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>"), re.compile(r"\bBREAK\b")


class ForeignSyntax(NamedTuple):
    """A piece of a prompt and its kind, a key of ADVICE."""

    kind: str
    text: str


def foreign_syntax(prompt: str) -> list[ForeignSyntax]:
    """The first piece of each kind. Takes linear time, since no pattern reads past the next opening of its kind."""
    first: dict[str, str] = {}
    for kind, text in _pieces(prompt):
        first.setdefault(kind, text)
    return [ForeignSyntax(kind, first[kind]) for kind in ADVICE if kind in first]


def describe_syntax(prompt: str) -> str | None:
    """A sentence for each piece, in one notice; None without any."""
    sentences = [f"In the prompt {quoted(text)} {ADVICE[kind]}." for kind, text in foreign_syntax(prompt)]
    return " ".join(sentences) or None


def _pieces(prompt: str) -> Iterator[tuple[str, str]]:
    for match in LORA.finditer(prompt):
        yield "lora", match[0]
    for match in BREAK.finditer(prompt):
        yield "break", match[0]
    for match in re.finditer(r"\[([^\[\]]*)\]", prompt):
        _, colon, end = match[1].rpartition(":")
        if colon and re.fullmatch(r"\d+(?:\.\d*)?|\.\d+", end.strip()):
            yield "schedule", match[0]
        elif "|" in match[1]:
            yield "choice", match[0]
    for match in re.finditer(r"\{([^{}]*)\}", prompt):
        if "|" in match[1]:
            yield "choice", match[0]
