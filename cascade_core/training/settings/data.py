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
    """A set of pictures with settings of its own. Regularisation pictures are a set with a `weight` below 1."""

    folder: str | None = None  # a folder of pictures with captions; its subfolders are read too
    tars: tuple[str, ...] = ()  # paths of webdataset tars, or patterns
    size: Annotated[int | None, Range(64, 4096)] = None  # replaces data.size for this set
    # replaces data.more_sizes for this set
    more_sizes: Annotated[tuple[int, ...] | None, Range(64, 4096)] = None
    masks: Masks | None = None  # replaces data.masks for this set
    mask_folder: str | None = None  # a folder with masks for this set's pictures
    caption: str | None = None  # caption for pictures of this set that have none; null: data.caption
    caption_suffix: str | None = None  # ending of this set's caption files; null: data.caption_suffix
    # how often an epoch shows each picture of this set; it is multiplied by data.repeat
    repeat: Annotated[int, Range(1, 10_000)] = 1
    weight: Annotated[float, Range(0, 1000)] = 1.0  # factor of the loss of this set's pictures
    trigger: str | None = None  # words before each caption of this set; null: data.trigger

    def __post_init__(self) -> None:
        check_ranges(self, "data.sets")
        if self.folder is None and not self.tars:
            raise CascadeError("data.sets: a set has neither a folder nor tars; name one of them.")


@dataclass(frozen=True)
class DataSettings:
    """The pictures, their captions, and how they are shown."""

    folder: str | None = None  # a folder of pictures with captions; its subfolders are read too
    tars: tuple[str, ...] = ()  # paths of webdataset tars, or patterns
    sets: tuple[DataSetSettings, ...] = ()  # more pictures, in sets that have settings of their own
    # the side in pixels of a square picture; other pictures have at most the same area. 1024 gives latents of 24
    # × 24
    size: Annotated[int, Range(64, 4096)] = 1024
    # further sizes: each picture is shown once in each of them. A picture skips a size at which it would be
    # cropped or enlarged more than max_crop and max_enlarge allow
    more_sizes: Annotated[tuple[int, ...], Range(64, 4096)] = ()
    bucket_step: int = 64  # pixels; the sides of buckets are multiples of it
    caption_dropout: Share = 0.05  # share of the pictures that is trained without caption
    # share of the pictures that is trained without image prompts, drawn independently of the captions
    image_prompt_dropout: Share = 0.05
    flip: bool = False  # mirrors half of the pictures
    cache: str | None = None  # folder in which encoded pictures and captions are kept between runs
    repeat: Annotated[int, Range(1, 10_000)] = 1  # how often an epoch shows each picture
    # pixels; pictures whose shorter side is smaller are left out
    min_side: Annotated[int, Range(16, 65_536)] = 16
    # pictures that would have to be enlarged by more than this factor are left out; 1 leaves out all that are
    # smaller than their bucket
    max_enlarge: Annotated[float | None, Range(1, 10_000)] = None
    # pictures that would lose more than this share of their area by cropping are left out
    max_crop: Share = 1.0
    enlarge: bool = True  # false: small pictures are not enlarged, but go into smaller buckets
    # largest ratio of a bucket's sides; longer pictures are cropped
    max_aspect: Annotated[float, Range(1, 16)] = 2.5
    min_bucket_side: Annotated[int | None, Range(16, 16_384)] = None  # pixels; smallest side of a bucket
    max_bucket_side: Annotated[int | None, Range(64, 16_384)] = None  # pixels; largest side of a bucket
    # number of crops of each picture, drawn at random before the training; one of them is shown at a time. 1:
    # only the centre
    crops: Annotated[int, Range(1, 256)] = 1
    # the smallest crop's sides are 1 / crop_zoom of the largest one's
    crop_zoom: Annotated[float, Range(1, 8)] = 1.0
    # where masks come from: none, files beside the pictures, or the pictures' transparency. A mask is white
    # where a picture counts in the loss
    masks: Masks = "none"
    mask_folder: str | None = None  # a folder of masks that have the names of the pictures in data.folder
    unmasked_weight: Share = 0.1  # weight of the area outside the mask, relative to that inside
    unmasked_share: Share = 0.0  # share of the pictures that is trained without mask
    caption: str | None = None  # caption for pictures that have none; null: such pictures are left out
    caption_suffix: str | None = None  # ending of caption files; null: .txt, .caption and .json
    trigger: str = ""  # words before each caption
    shuffle_tags: bool = False  # shuffles the tags of a caption
    # number of tags at the beginning that are neither moved nor dropped
    keep_tags: Annotated[int, Range(0, 1000)] = 0
    tag_dropout: Annotated[float, Range(0, 1, below=True)] = 0.0  # share of the other tags that is left out
    tag_separator: str = ","  # the sign between tags
    # how many texts with shuffled and dropped tags are drawn for each caption before the training
    caption_variants: Annotated[int, Range(1, 64)] = 8

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
