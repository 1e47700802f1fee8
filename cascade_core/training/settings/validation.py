"""`validation`: pictures that are never trained on, and how often the error on them is measured."""

from dataclasses import dataclass
from typing import Annotated

from ...errors import CascadeError
from ..ranges import Every, Range, check_ranges


@dataclass(frozen=True)
class ValidationSettings:
    """Pictures that are held out: a `share` of the data's, or those of a `folder` or `tars`.

    The error in the noise on them is not weighed, and follows from the pictures and the network alone, so that runs
    with other settings can be compared.
    """

    every: Every = 0  # steps, or epochs such as `1 epoch`; 0 is never
    # of the data's pictures that are held out
    share: Annotated[float, Range(0, 0.5)] = 0.0
    # of other pictures
    folder: str | None = None
    # of other pictures
    tars: tuple[str, ...] = ()
    pictures: Annotated[int, Range(1, 10_000)] = 64  # at most so many of them are looked at
    times: Annotated[int, Range(1, 100)] = 4  # evenly spread amounts of noise on each picture

    def __post_init__(self) -> None:
        check_ranges(self, "validation")
        sources = bool(self.share) + bool(self.folder or self.tars)
        if self.every and sources != 1:
            raise CascadeError(
                "validation.every measures on pictures that are held out; give either a share of the data's, or a "
                "folder or tars."
            )
        if sources and not self.every:
            raise CascadeError("validation holds pictures out, but every is 0; give the steps, such as 100.")
