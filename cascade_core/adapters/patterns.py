"""Patterns of names from files and prompts: only those that stand for a few plain texts; no regular expression is run.

`re` can take years for a regular expression of twenty characters.
"""

from __future__ import annotations

import itertools
import math
import re
from typing import NamedTuple

MOST_TEXTS = 64
LONGEST_PATTERN = 10_000  # characters


class Text(NamedTuple):
    """One text that a pattern stands for, and whether it has to be at the name's start and at its end."""

    text: str
    at_start: bool
    at_end: bool

    def is_in(self, name: str) -> bool:
        if self.at_start and self.at_end:
            return name == self.text
        if self.at_start or self.at_end:
            return name.startswith(self.text) if self.at_start else name.endswith(self.text)
        return self.text in name


def texts(pattern: str, plain: str = "") -> list[Text] | None:
    r"""The texts of a pattern made of `|`, `^`, `$`, optional characters (`stars?`) and escaped ones (`\.`).

    plain: further characters that stand for themselves. None for a pattern of anything else, or of LONGEST_PATTERN
    and more.
    """
    if len(pattern) >= LONGEST_PATTERN:
        return None
    alternatives = []
    for part in pattern.split("|"):
        inner = part.removeprefix("^").removesuffix("$")
        signs: list[tuple[str, ...]] = []  # the spellings of each
        for sign in re.findall(r"\\.|.", inner, re.DOTALL):
            if sign == "?" and signs and len(signs[-1]) == 1:
                signs[-1] = ("", *signs[-1])
            elif sign in plain or re.fullmatch(r"\\[^a-zA-Z0-9]|[^\\.\[\](){}*+?^$]", sign, re.DOTALL):
                signs.append((sign[-1],))
            else:
                return None
        if math.prod(map(len, signs)) > MOST_TEXTS:
            return None
        spellings = map("".join, itertools.product(*signs))
        alternatives += [Text(text, part.startswith("^"), part.endswith("$")) for text in spellings]
    return alternatives
