"""Ranges of all numbers for making a picture, the same for the nodes and the front door."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from numbers import Real
from typing import Any, Generic, TypeVar

from .errors import CascadeError, quoted

T = TypeVar("T", int, float)


@dataclass(frozen=True, slots=True)
class Bounds(Generic[T]):
    """A range from `least` to `most`, both included."""

    least: T
    most: T

    def __str__(self) -> str:
        style = "," if isinstance(self.most, int) else "g"
        return f"from {self.least:{style}} to {self.most:{style}}"

    def input(self) -> dict[str, Any]:
        """The range as an input of a node declares it."""
        return {"min": self.least, "max": self.most}


SEED = Bounds(0, 2**64 - 1)
STEPS = Bounds(1, 10_000)
CFG = Bounds(0.0, 100.0)
CFG_RESCALE = Bounds(0.0, 1.0)
SHIFT = Bounds(0.05, 20.0)
DENOISE = Bounds(0.0, 1.0)
BATCH = Bounds(1, 4096)
GROW = Bounds(0, 16)  # positions of Stage C, of which 1024 pixels have 24
FEATHER = Bounds(0, 512)  # pixels; each takes a pass over the picture
STRENGTH = Bounds(-10.0, 10.0)  # of LoRAs, learned tokens and picture prompts
ALPHA = Bounds(0.0, 1e6)  # of LoRAs; 0: as the file states
CONTROL_STRENGTH = Bounds(0.0, 10.0)
SHARE = Bounds(0.0, 1.0)  # of the steps
TILE = Bounds(0, 16_384)  # pixels; 0: whole
CANNY = Bounds(0, 2040)  # the gradient |dx| + |dy| of 8 bits


def whole_number(name: str, value: Any, within: Bounds[int]) -> int:
    """A whole number of any library as Python's own. Raises CascadeError for anything else, and out of range."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not within.least <= number <= within.most:
        raise CascadeError(f"{name} is {quoted(value)}; give a whole number {within}.")
    return number


def real_number(name: str, value: Any, within: Bounds[float]) -> float:
    """A number of any library as Python's own. Raises CascadeError for anything else, NaN, and out of range."""
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.nan
    if not within.least <= number <= within.most:
        raise CascadeError(f"{name} is {quoted(value)}; give a number {within}.")
    return number
