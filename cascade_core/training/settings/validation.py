"""`validation`: pictures that are never trained on, and how often the error on them is measured."""

from dataclasses import dataclass
from typing import Annotated

from ...errors import CascadeError
from ..ranges import Every, Range, check_ranges


@dataclass(frozen=True)
class ValidationSettings:
    """Held-out pictures: a `share` of the data's pictures, or those of a `folder` or of `tars`.

    The error of the predicted noise is measured on them without `weighting`. It depends only on the pictures and the
    network, so runs with different settings can be compared.
    """

    every: Every = 0  # how often the error is measured, in steps, or in epochs such as `1 epoch`; 0: never
    share: Annotated[float, Range(0, 0.5)] = 0.0  # share of the data's pictures that is held out
    folder: str | None = None  # a folder of other pictures, instead of a share
    tars: tuple[str, ...] = ()  # tars of other pictures, instead of a share
    pictures: Annotated[int, Range(1, 10_000)] = 64  # largest number of pictures that are measured
    times: Annotated[int, Range(1, 100)] = 4  # number of noise levels for each picture, evenly spread

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
