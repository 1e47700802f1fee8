"""`data`: where pictures come from, how they are cut, and what is trained of their captions."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from ...errors import CascadeError, quoted
from ..ranges import Range, Share, check_ranges

MAX_SETS = 100
MAX_SIZES = 8
MAX_CAPTION = 500  # characters of `trigger` and of `caption`

# Sources of masks: none; files beside the pictures, `star.mask.png` or `star-masklabel.png` for `star.png`; or the
# pictures' own transparency
Masks = Literal["none", "beside", "alpha"]


@dataclass(frozen=True)
class DataSetSettings:
    """One of several sets. `weight`: factor of its pictures' loss; regularisation pictures have less than 1."""

    # pictures with captions, also in its subfolders
    folder: str | None = None
    # webdataset tars: paths or patterns
    tars: tuple[str, ...] = ()
    size: Annotated[int | None, Range(64, 4096)] = None  # null: data.size
    more_sizes: Annotated[tuple[int, ...] | None, Range(64, 4096)] = None  # null: data.more_sizes
    masks: Masks | None = None  # null: data.masks
    mask_folder: str | None = None  # of its masks
    caption: str | None = None  # of its pictures without one; null: data.caption
    caption_suffix: str | None = None  # of its caption files; null: data.caption_suffix
    repeat: Annotated[int, Range(1, 10_000)] = 1  # times data.repeat
    # factor of its pictures' loss
    weight: Annotated[float, Range(0, 1000)] = 1.0
    trigger: str | None = None  # words before each of its captions; null: data.trigger

    def __post_init__(self) -> None:
        check_ranges(self, "data.sets")
        if self.folder is None and not self.tars:
            raise CascadeError("data.sets: a set has neither a folder nor tars; name one of them.")


@dataclass(frozen=True)
class DataSettings:
    """Where pictures come from, and how they are shown."""

    folder: str | None = None  # pictures with captions, also in its subfolders
    tars: tuple[str, ...] = ()  # webdataset tars: paths or patterns
    sets: tuple[DataSetSettings, ...] = ()  # more of them, each shown and weighed in its own way
    # pixels as generated: a picture's area is at most size²; 1024 gives latents of 24 × 24
    size: Annotated[int, Range(64, 4096)] = 1024
    # Further sizes: each picture is shown once in each of them. A size at which too much of a picture would be cropped,
    # or it would be enlarged too much, is skipped for it
    more_sizes: Annotated[tuple[int, ...], Range(64, 4096)] = ()
    bucket_step: int = 64  # pixels; sides of the buckets are multiples of it
    caption_dropout: Share = 0.05  # share of rows that are trained without their caption
    image_prompt_dropout: Share = 0.05  # share of rows without image prompts, drawn independently of captions
    flip: bool = False  # half of the rows are mirrored
    cache: str | None = None  # folder in which latents are kept between runs
    repeat: Annotated[int, Range(1, 10_000)] = 1  # how often an epoch shows each picture
    # pixels; pictures with a shorter side below it are left out
    min_side: Annotated[int, Range(16, 65_536)] = 16
    # pictures that would be enlarged by a larger factor are left out; 1: all that are smaller than their bucket
    max_enlarge: Annotated[float | None, Range(1, 10_000)] = None
    max_crop: Share = 1.0  # pictures of which more than this share would be cropped are left out
    enlarge: bool = True  # false: a picture smaller than its bucket goes into one of its own size
    max_aspect: Annotated[float, Range(1, 16)] = 2.5  # of the buckets at most; longer pictures are cropped
    min_bucket_side: Annotated[int | None, Range(16, 16_384)] = None  # pixels
    max_bucket_side: Annotated[int | None, Range(64, 16_384)] = None  # pixels
    # Number of crops of each picture, drawn beforehand at random places, each with its own latents; one is shown at a
    # time. 1: the centre.
    crops: Annotated[int, Range(1, 256)] = 1
    # the smallest crop's sides are 1 / crop_zoom of the largest one's
    crop_zoom: Annotated[float, Range(1, 8)] = 1.0
    # Masks: white where a picture counts in the loss
    masks: Masks = "none"
    # folder of masks, named as the pictures in data.folder
    mask_folder: str | None = None
    unmasked_weight: Share = 0.1  # weight of the area outside of masks, relative to that inside
    unmasked_share: Share = 0.0  # share of rows that are trained without their mask
    caption: str | None = None  # for pictures without one; null: they are left out
    caption_suffix: str | None = None  # of caption files; null: .txt, .caption and .json
    trigger: str = ""  # words before each caption
    shuffle_tags: bool = False  # whether the order of tags is shuffled
    keep_tags: Annotated[int, Range(0, 1000)] = 0  # number of first tags that are neither moved nor dropped
    tag_dropout: Annotated[float, Range(0, 1, below=True)] = 0.0  # share of the other tags that is left out
    tag_separator: str = ","  # sign between tags
    caption_variants: Annotated[int, Range(1, 64)] = 8  # for each caption, drawn beforehand and encoded once

    def __post_init__(self) -> None:
        object.__setattr__(self, "tars", (self.tars,) if isinstance(self.tars, str) else tuple(self.tars))
        check_ranges(self, "data")
        if not self.tag_separator.strip() or len(self.tag_separator) > 16:
            raise CascadeError(
                f"data.tag_separator is {quoted(self.tag_separator)}; a sign such as , or ; is expected."
            )
        for each in (self, *self.sets):
            for name in ("trigger", "caption"):
                if len(text := getattr(each, name) or "") > MAX_CAPTION:
                    raise CascadeError(
                        f"data.{name} is {quoted(text)}; at most {MAX_CAPTION} characters are expected."
                    )
            _check_suffix(each.caption_suffix)
        if len(self.sets) > MAX_SETS:
            raise CascadeError(f"data.sets has {len(self.sets)} entries; give at most {MAX_SETS}.")
        if self.folder is None and not self.tars and not self.sets:
            raise CascadeError("The training data has neither a folder nor tars; name one of them.")
        if not 8 <= self.bucket_step <= self.size:
            raise CascadeError(
                f"data.bucket_step is {quoted(self.bucket_step)}; it must lie within 8 and the size, {self.size}."
            )
        self._check_sizes()

    @property
    def masked(self) -> bool:
        """Whether pictures may have masks."""
        return any(each.masks not in (None, "none") or each.mask_folder for each in (self, *self.sets))

    def sizes_of(self, number: int) -> tuple[int, ...]:
        """The sizes in which pictures of a set are shown. number: of the set in `sets`; -1 for none"""
        if number < 0:
            return self.size, *self.more_sizes
        own = self.sets[number]
        more = self.more_sizes if own.more_sizes is None else own.more_sizes
        return self.size if own.size is None else own.size, *more

    def _check_sizes(self) -> None:
        least, largest = self.min_bucket_side or 0, self.max_bucket_side or math.inf
        for number in range(-1, len(self.sets)):
            if len(self.sizes_of(number)) > MAX_SIZES:
                raise CascadeError(
                    f"data.more_sizes has {len(self.sizes_of(number)) - 1} sizes; give at most {MAX_SIZES - 1}."
                )
        for size in {size for number in range(-1, len(self.sets)) for size in self.sizes_of(number)}:
            if not max(self.bucket_step, least) <= size <= largest:
                raise CascadeError(
                    f"data.size is {size}, a bucket's side, which data.bucket_step, min_bucket_side or max_bucket_side "
                    "does not allow; change one of them."
                )


def _check_suffix(suffix: str | None) -> None:
    if suffix is not None and not (suffix.startswith(".") and suffix[1:].isalnum() and len(suffix) <= 16):
        raise CascadeError(
            f"data.caption_suffix is {quoted(suffix)}; the ending of a file's name such as .txt is expected."
        )
