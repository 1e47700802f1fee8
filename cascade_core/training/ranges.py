"""Ranges of numbers, stated beside a setting's type: `steps: Annotated[int, Range(1, 1000)]`."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

from ..errors import CascadeError, printable, quoted


@dataclass(frozen=True)
class Range:
    """Numbers from low to high. above, below: the bound itself lies outside. NaN lies in no range."""

    low: float
    high: float
    above: bool = False
    below: bool = False

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        enough = self.low < value if self.above else self.low <= value
        return enough and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low, high = (
            f"{bound:,}" if isinstance(bound, int) else f"{bound:,.15g}" for bound in (self.low, self.high)
        )
        return (
            f"{'above' if self.above else 'at least'} {low} and {'below' if self.below else 'at most'} {high}"
        )


EPOCHS = re.compile(r"(\d{1,6}(?:\.\d{1,6})?) epochs?")


class StepsOrEpochs(Range):
    """Whole steps, or a text such as `2 epochs`."""

    def __contains__(self, value: object) -> bool:
        if isinstance(value, str):
            match = EPOCHS.fullmatch(value)
            return match is not None and float(match[1]) > 0
        return isinstance(value, int) and super().__contains__(value)

    def __str__(self) -> str:
        return f"whole steps, {super().__str__()}, or epochs, such as '1 epoch'"


def in_steps(value: int | str, steps_per_epoch: float) -> int:
    """A number of steps, from one given in steps or epochs."""
    match = EPOCHS.fullmatch(value) if isinstance(value, str) else None
    return max(round(float(match[1]) * steps_per_epoch), 1) if match else int(value)


def check_ranges(settings: Any, section: str) -> None:
    """Raises CascadeError for a field of a dataclass outside its annotated range; null is always allowed.

    section: of the file, for messages.
    """
    for name, kind in get_type_hints(type(settings), include_extras=True).items():
        for allowed in getattr(kind, "__metadata__", ()):
            value = getattr(settings, name)
            key = f"{section}.{name}"
            if isinstance(value, dict):
                found = [(f"{key}.{printable(each)}", number) for each, number in value.items()]
            else:
                found = [(key, number) for number in (value if isinstance(value, tuple) else (value,))]
            for key, number in found:
                if number is not None and number not in allowed:
                    raise CascadeError(f"{key} is {quoted(number)}; it must be {allowed}.")


# Ranges shared by several settings
Share = Annotated[float, Range(0, 1)]
Steps = Annotated[int, Range(1, 100_000_000)]
RateFactor = Annotated[float, Range(0, 10_000, above=True)]  # by which the learning rate is multiplied
StepsOrShare = Annotated[int | float, Range(0, 100_000_000)]  # steps; below 1 a share of the run's
Every = Annotated[int | str, StepsOrEpochs(0, 100_000_000)]  # 0 is never
