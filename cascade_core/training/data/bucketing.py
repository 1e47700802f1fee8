"""Which bucket each picture goes into."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .buckets import Bucket, nearest
from .cache import Cache, Key, key_of
from .decoding import in_threads
from .pictures import Picture, PictureError, Skipped, picture_size, read_picture

HEADER = 65_536  # bytes; most pictures say their size within them


@dataclass(frozen=True, slots=True)
class Placed:
    """A picture in its bucket."""

    picture: Picture
    bucket: Bucket
    scale: float  # by which it is resized to the bucket's size

    def key(self, mirrored: bool) -> Key:
        """Of its latent in a cache."""
        return key_of(self.picture.identity, *self.bucket, mirrored)

    def pixels(self, size: tuple[int, int]) -> Tensor:
        """uint8 (3, *size). Raises PictureError."""
        try:
            data = self.picture.read()
        except OSError as error:
            raise PictureError(error.strerror or str(error)) from None
        return read_picture(data, self.bucket, size)


def place(
    pictures: Sequence[Picture], sizes: tuple[Bucket, ...], known: Cache
) -> tuple[list[Placed], list[Skipped]]:
    """Each picture's bucket. known: sizes in pixels that were read before, (2,) int32 by picture."""
    keys = [key_of(picture.identity) for picture in pictures]
    new = [(key, picture) for key, picture in zip(keys, pictures, strict=True) if key not in known]
    skipped, read = [], {}
    for (key, picture), size in in_threads(lambda item: _size(item[1]), new, ahead=1000):
        if isinstance(size, PictureError):
            skipped.append(Skipped(picture.name, str(size)))
        else:
            read[key] = size
    if read:
        known.add(list(read), torch.tensor(list(read.values()), dtype=torch.int32))
    placed = []
    for key, picture in zip(keys, pictures, strict=True):
        if key in known:
            height, width = known.rows[key].tolist()
            bucket = nearest(sizes, height, width)
            placed.append(Placed(picture, bucket, max(bucket.height / height, bucket.width / width)))
    return placed, skipped


def _size(picture: Picture) -> tuple[int, int]:
    try:
        try:
            return picture_size(picture.read(HEADER))
        except PictureError:
            if picture.length <= HEADER:
                raise
            return picture_size(picture.read())
    except OSError as error:
        raise PictureError(error.strerror or str(error)) from None
