"""`data`: where pictures come from, how they are cut, and what is trained of their captions."""

from dataclasses import dataclass
from typing import Annotated

from ...errors import CascadeError, quoted
from ..ranges import Range, Share, check_ranges

MAX_SETS = 100


@dataclass(frozen=True)
class DataSetSettings:
    """One of several sets. `weight`: of its pictures in the loss, as regularisation pictures have less than 1."""

    folder: str | None = None
    tars: tuple[str, ...] = ()
    repeat: Annotated[int, Range(1, 10_000)] = 1  # times data.repeat
    weight: Annotated[float, Range(0, 1000)] = 1.0
    trigger: str | None = None  # words before each of its captions; null: data.trigger

    def __post_init__(self) -> None:
        check_ranges(self, "data.sets")
        if self.folder is None and not self.tars:
            raise CascadeError("data.sets: a set has neither a folder nor tars; name one of them.")


@dataclass(frozen=True)
class DataSettings:
    """Where pictures come from, and how they are shown."""

    folder: str | None = None  # of pictures with captions, subfolders too
    tars: tuple[str, ...] = ()  # webdataset tars: paths or patterns
    sets: tuple[DataSetSettings, ...] = ()  # more of them, each shown and weighed in its own way
    # pixels as generated: a picture's area is at most size²; 1024 gives latents of 24 × 24
    size: Annotated[int, Range(64, 4096)] = 1024
    bucket_step: int = 64  # pixels; sides of the buckets are multiples of it
    caption_dropout: Share = 0.05  # the share of rows that are trained without words
    image_prompt_dropout: Share = 0.05  # the same without their image prompts, chosen apart from the words
    flip: bool = False  # half of the rows are mirrored
    cache: str | None = None  # folder where latents are kept between runs
    repeat: Annotated[int, Range(1, 10_000)] = 1  # how often an epoch shows each picture
    # Which pictures are left out: by their shorter side in pixels; by how many times they would be enlarged (1: all
    # that are smaller than their bucket); by the share of their area that would be cropped. null and 1: none are.
    min_side: Annotated[int, Range(16, 65_536)] = 16
    max_enlarge: Annotated[float | None, Range(1, 10_000)] = None
    max_crop: Share = 1.0
    enlarge: bool = True  # false: a picture smaller than its bucket goes into one of its own size
    max_aspect: Annotated[float, Range(1, 16)] = 2.5  # of the buckets: what is longer is cropped to it
    # What is trained of captions: words before each; tags, which stand between separators, in another order and some of
    # them left out, but for the first keep_tags; so many variants of each caption are drawn beforehand and encoded
    trigger: str = ""
    shuffle_tags: bool = False
    keep_tags: Annotated[int, Range(0, 1000)] = 0
    tag_dropout: Annotated[float, Range(0, 1, below=True)] = 0.0
    tag_separator: str = ","
    caption_variants: Annotated[int, Range(1, 64)] = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "tars", (self.tars,) if isinstance(self.tars, str) else tuple(self.tars))
        check_ranges(self, "data")
        if not self.tag_separator.strip() or len(self.tag_separator) > 16:
            raise CascadeError(
                f"data.tag_separator is {quoted(self.tag_separator)}; a sign such as , or ; is expected."
            )
        for trigger in (self.trigger, *(each.trigger or "" for each in self.sets)):
            if len(trigger) > 500:
                raise CascadeError(f"data.trigger is {quoted(trigger)}; at most 500 characters are expected.")
        if len(self.sets) > MAX_SETS:
            raise CascadeError(f"data.sets has {len(self.sets)} entries; give at most {MAX_SETS}.")
        if self.folder is None and not self.tars and not self.sets:
            raise CascadeError("The training data has neither a folder nor tars; name one of them.")
        if not 8 <= self.bucket_step <= self.size:
            raise CascadeError(
                f"data.bucket_step is {quoted(self.bucket_step)}; it must lie within 8 and the size, {self.size}."
            )
