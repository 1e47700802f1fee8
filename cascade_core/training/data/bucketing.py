"""Bucketing by aspect ratio: which bucket each picture goes into."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .buckets import Bucket, nearest
from .cache import Cache, Key, key_of
from .pictures import PictureError, Skipped, TrainingPicture, picture_size, read_picture
from .threads import map_in_threads

HEADER_BYTES = 65_536  # most pictures state their size within them
MIN_SIDE = 16  # pixels; what is smaller shows nothing


@dataclass(frozen=True, slots=True)
class BucketedPicture:
    """A picture in its bucket. scale: by which it is resized to the bucket's size"""

    picture: TrainingPicture
    bucket: Bucket
    scale: float

    def key(self, mirrored: bool) -> Key:
        """Key of its latent in a cache."""
        return key_of(self.picture.identity, *self.bucket, mirrored)

    def pixels(self, size: tuple[int, int]) -> Tensor:
        """uint8 (3, *size). Raises PictureError."""
        return read_picture(self.picture.read(), self.bucket, size)


def assign_buckets(
    pictures: Sequence[TrainingPicture],
    buckets: tuple[Bucket, ...],
    sizes: Cache,
    ask: Callable[[], None] = lambda: None,
) -> tuple[list[BucketedPicture], list[Skipped]]:
    """Assign each picture to the bucket nearest to its aspect ratio; pictures that cannot be read are skipped.

    sizes: (height, width) in pixels of pictures that were read before, (2,) int32 each; new ones are added.
    ask: called at each picture; raises Interrupted where the run should end.
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
    bucketed = []
    for key, picture in zip(keys, pictures, strict=True):
        if key not in sizes:
            continue
        height, width = sizes.rows[key].tolist()
        if min(height, width) < MIN_SIDE:
            skipped.append(
                Skipped(
                    picture.name, f"{width} × {height} pixels are too few; give {MIN_SIDE} a side or more"
                )
            )
            continue
        bucket = nearest(buckets, height, width)
        scale = max(bucket.height / height, bucket.width / width)
        bucketed.append(BucketedPicture(picture, bucket, scale))
    return bucketed, skipped


def _size(picture: TrainingPicture) -> tuple[int, int]:
    """(height, width) in pixels, from the file's header where that suffices."""
    try:
        return picture_size(picture.read(HEADER_BYTES))
    except PictureError:
        if picture.length <= HEADER_BYTES:
            raise
        return picture_size(picture.read())
