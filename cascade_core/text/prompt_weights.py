"""Prompt weights: `(word)`, `(word:1.3)`, nesting and `\\(` escapes, read as ComfyUI reads them.

- `(text)` multiplies the weight around it by 1.1; `(text:1.3)` sets it to 1.3, whatever surrounds it.
- Brackets nest; `\\(` and `\\)` are literal brackets.
- Unbalanced brackets are never an error. `(a` and `a)` are plain text; after a surplus closing bracket, the next
opening bracket only compensates for it: `a) (b:2)` is plain text altogether.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ..errors import CascadeError, printable

EMPHASIS = 1.1
LONGEST_PROMPT = 2**17  # characters: about 400 chunks of 75 tokens, each of which is encoded
MOST_READ = 10**7  # characters; those inside brackets count once for each bracket around them
LARGEST_WEIGHT = 3e38  # float32 holds no more
# While brackets are matched, escaped ones are replaced by control characters, which nobody types.
HIDDEN_BRACKETS = {"\\)": "\0\1", "\\(": "\0\2"}


class Segment(NamedTuple):
    """A run of prompt text under one weight."""

    text: str
    weight: float


def parse_weights(prompt: str) -> list[Segment]:
    """The prompt as segments in reading order, escapes resolved; empty for an empty prompt.

    Raises CascadeError for a weight that no float32 holds, such as `(cat:nan)` or `(cat:1e99)`, and for a prompt whose
    length or brackets would take minutes.
    """
    if len(prompt) > LONGEST_PROMPT:
        raise CascadeError(
            f"The prompt has {len(prompt):,} characters, but at most {LONGEST_PROMPT:,} are read; shorten it."
        )
    for escaped, hidden in HIDDEN_BRACKETS.items():
        prompt = prompt.replace(escaped, hidden)
    segments = []
    pending = [(prompt, 1.0, False)]  # (text, weight, plain): a stack, so that brackets may nest deeply
    read = 0
    while pending:
        text, weight, plain = pending.pop()
        read += len(text)
        if read > MOST_READ:
            raise CascadeError(
                "The prompt's brackets are nested too deeply; take some out, or write \\( and \\) where they are meant."
            )
        if plain:
            segments.append(Segment(_show_brackets(text), weight))
            continue
        for part in reversed(_split_groups(text)):
            if len(part) >= 2 and part[0] == "(" and part[-1] == ")":
                pending.append((*_read_group(part[1:-1], weight), False))
            else:
                pending.append((part, weight, True))
    return segments


def _split_groups(text: str) -> list[str]:
    """`"a (b (c)) d"` -> `["a ", "(b (c))", " d"]`: the outermost brackets stand alone."""
    parts, start, depth = [], 0, 0
    for bracket in re.finditer(r"[()]", text):
        if bracket[0] == "(":
            if depth == 0:
                parts.append(text[start : bracket.start()])
                start = bracket.start()
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                parts.append(text[start : bracket.end()])
                start = bracket.end()
    parts.append(text[start:])
    return [part for part in parts if part]


def _read_group(inside: str, weight: float) -> tuple[str, float]:
    """The text and weight of what stood between brackets: `"cat:1.3"` -> `("cat", 1.3)`."""
    text, colon, number = inside.rpartition(":")
    if colon and text:
        try:
            return text, _checked(float(number), inside)
        except CascadeError:
            raise
        except ValueError:  # the colon is part of the prompt
            pass
    return inside, _checked(weight * EMPHASIS, inside)


def _checked(weight: float, inside: str) -> float:
    if abs(weight) <= LARGEST_WEIGHT:  # also false for nan
        return weight
    shown = printable(_show_brackets(inside if len(inside) <= 60 else f"{inside[:30]} … {inside[-30:]}"))
    raise CascadeError(
        f"The prompt gives ({shown}) the weight {weight}, which is not a finite number; "
        "write one such as (word:1.3), or \\( and \\) where brackets are meant."
    )


def _show_brackets(text: str) -> str:
    for escaped, hidden in HIDDEN_BRACKETS.items():
        text = text.replace(hidden, escaped[1:])
    return text
