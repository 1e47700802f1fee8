"""Bucketing by aspect ratio: which bucket each picture goes into."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import printable
from ..settings import DataSettings
from .buckets import Bucket, buckets, nearest, own_bucket
from .cache import Cache, Key, key_of
from .pictures import (
    CENTRE,
    Crop,
    PictureError,
    Skipped,
    TrainingPicture,
    picture_size,
    read_mask,
    read_picture,
)
from .threads import map_in_threads

CROPPED = 0.1  # share of a picture's area; smaller losses are not reported
HEADER_BYTES = 65_536  # most pictures state their size within them


@dataclass(frozen=True, slots=True)
class BucketedPicture:
    """A picture in its bucket. size: its own, (height, width) in pixels"""

    picture: TrainingPicture
    bucket: Bucket
    size: tuple[int, int]

    @property
    def scale(self) -> float:
        """Factor by which the picture is resized: above 1 it is enlarged."""
        return max(self.bucket.height / self.size[0], self.bucket.width / self.size[1])

    @property
    def kept(self) -> float:
        """The share of its area that the bucket shows; the rest is cropped."""
        shown = self.bucket.height * self.bucket.width / self.scale**2
        return min(shown / (self.size[0] * self.size[1]), 1.0)

    def key(self, mirrored: bool, crop: Crop = CENTRE) -> Key:
        """Key of its latent in a cache."""
        part = () if crop == CENTRE else crop
        return key_of(self.picture.identity, *self.bucket, mirrored, *part)

    def pixels(self, size: tuple[int, int], crop: Crop = CENTRE) -> Tensor:
        """uint8 (3, *size). Raises PictureError."""
        return read_picture(self.picture.read(), self.bucket, size, crop)

    def mask(self, crop: Crop = CENTRE) -> Tensor:
        """uint8 (h, w) of the latent's size, of a picture that has a mask. Raises PictureError."""
        file, (height, width) = self.picture.mask, self.size
        assert file is not None
        transparency = file.identity == self.picture.identity
        return read_mask(file.read(), self.bucket, self.bucket.latent, crop, transparency, width / height)


class Crops(NamedTuple):
    """How many parts of each picture are shown, whose sides are at least 1 / zoom of the largest part's."""

    count: int = 1
    zoom: float = 1.0

    def of(self, picture: BucketedPicture, number: int) -> Crop:
        """A part at random, but the same on every machine and in every run; if there is only one, the centre.

        No part is so small that it would have to be enlarged.
        """
        if self.count == 1:
            return CENTRE
        random = Random(key_of("crop", picture.picture.name, number))
        x, y, share = random.random(), random.random(), random.random()
        most = max(min(self.zoom, 1 / picture.scale), 1.0)
        return Crop(x, y, 1 + (most - 1) * share)

    def all_of(self, picture: BucketedPicture) -> list[Crop]:
        return [self.of(picture, number) for number in range(self.count)]


CENTRES = Crops()


class Chooser:
    """Chooses a picture's buckets, one of each size, or leaves the picture out, by the settings."""

    def __init__(self, settings: DataSettings):
        self.settings = s = settings
        self.sides = s.min_bucket_side or 0, s.max_bucket_side or math.inf
        self.buckets = {
            size: buckets(size, s.bucket_step, s.max_aspect, *self.sides)
            for size in {size for number in range(-1, len(s.sets)) for size in s.sizes_of(number)}
        }

    def choose(
        self, picture: TrainingPicture, height: int, width: int
    ) -> tuple[list[BucketedPicture], str | None]:
        """The picture in its bucket of each size that suits it; or none, and why."""
        sizes = self.settings.sizes_of(picture.set)
        distinct = dict.fromkeys(self.bucket(height, width, size) for size in sizes)
        bucketed = [BucketedPicture(picture, bucket, (height, width)) for bucket in distinct]
        faults = [self.fault(each) for each in bucketed]
        suiting = [each for each, fault in zip(bucketed, faults, strict=True) if fault is None]
        return suiting, None if suiting else faults[0]

    def bucket(self, height: int, width: int, size: int) -> Bucket:
        """The bucket nearest to the aspect ratio; without `enlarge`, for a smaller picture, one of its own size."""
        s = self.settings
        chosen = nearest(self.buckets[size], height, width)
        if s.enlarge or (height >= chosen.height and width >= chosen.width):
            return chosen
        return own_bucket(height, width, s.bucket_step, s.max_aspect, self.sides[0])

    def fault(self, picture: BucketedPicture) -> str | None:
        """Why a picture is left out, in words that are the same for many pictures; None where it is not."""
        s = self.settings
        if s.max_enlarge is not None and picture.scale > s.max_enlarge:
            return f"it would be enlarged by a factor of more than {s.max_enlarge:g} (data.max_enlarge)"
        if 1 - picture.kept > s.max_crop:
            return f"more than {s.max_crop:.0%} of it would be cropped (data.max_crop)"
        return None


def assign_buckets(
    pictures: Sequence[TrainingPicture],
    settings: DataSettings,
    sizes: Cache,
    ask: Callable[[], None] = lambda: None,
) -> tuple[list[BucketedPicture], list[Skipped]]:
    """Assigns each picture to its bucket; pictures that cannot be read, or exceed the settings' limits, are skipped.

    sizes: (height, width) in pixels of pictures that were read before, (2,) int32 each; new ones are added.
    ask: called for each picture; raises Interrupted to end the run.
    """
    keys = [key_of(picture.identity) for picture in pictures]
    for key in keys:
        sizes.keep(key, (2,), torch.int32)
    new = [(key, picture) for key, picture in zip(keys, pictures, strict=True) if key not in sizes]
    skipped, new_sizes = [], {}
    for (key, picture), size in map_in_threads(lambda item: _size(item[1]), new, ahead=1000, ask=ask):
        if isinstance(size, PictureError):
            skipped.append(Skipped(picture.name, size.reason))
        else:
            new_sizes[key] = size
    if new_sizes:
        sizes.add(list(new_sizes), torch.tensor(list(new_sizes.values()), dtype=torch.int32))
    bucketed, chooser = [], Chooser(settings)
    for key, picture in zip(keys, pictures, strict=True):
        if key not in sizes:
            continue
        height, width = sizes.rows[key].tolist()
        if min(height, width) < settings.min_side:
            few = f"{width} × {height} pixels are too few; give {settings.min_side} a side or more"
            skipped.append(Skipped(picture.name, few))
            continue
        chosen, fault = chooser.choose(picture, height, width)
        bucketed += chosen
        if fault is not None:
            skipped.append(Skipped(picture.name, fault))
    return bucketed, skipped


class Resized(NamedTuple):
    """Report of how many pictures are enlarged and cropped for their buckets."""

    enlarged: list[BucketedPicture]
    cropped: list[BucketedPicture]  # those that lose more than CROPPED of their area

    def sentence(self) -> str:
        """The report in words; empty where no picture is enlarged or cropped."""
        parts = []
        if self.enlarged:
            most = max(self.enlarged, key=lambda each: each.scale)
            parts.append(
                f"{len(self.enlarged):,} {_are(self.enlarged)} smaller and enlarged, {printable(most.picture.name)} "
                f"the most, {most.scale:.3g} times"
            )
        if self.cropped:
            most = min(self.cropped, key=lambda each: each.kept)
            parts.append(
                f"{len(self.cropped):,} {_are(self.cropped)} cropped by more than {CROPPED:.0%}, "
                f"{printable(most.picture.name)} the most, of which {most.kept:.0%} stays"
            )
        return "; ".join(parts)


def resized(pictures: Sequence[BucketedPicture]) -> Resized:
    return Resized(
        [each for each in pictures if each.scale > 1], [each for each in pictures if 1 - each.kept > CROPPED]
    )


def _are(pictures: Sequence[BucketedPicture]) -> str:
    return "is" if len(pictures) == 1 else "are"


def _size(picture: TrainingPicture) -> tuple[int, int]:
    """(height, width) in pixels, from the file's header where that suffices."""
    try:
        return picture_size(picture.read(HEADER_BYTES))
    except PictureError:
        if picture.length <= HEADER_BYTES:
            raise
        return picture_size(picture.read())
