"""Aspect-ratio buckets: the sizes to which training pictures are brought, all of about the same area."""

import math
from functools import lru_cache
from typing import NamedTuple

from ...geometry import compressor_size, stage_c_size

MAX_ASPECT = 2.5  # a longer picture is cropped to it, unless the settings say otherwise
MIN_BUCKET = 64  # pixels; a shorter side has fewer than two positions of Stage C


class Bucket(NamedTuple):
    """A size in pixels, as used for generating."""

    height: int
    width: int

    @property
    def latent(self) -> tuple[int, int]:
        """(h, w) of Stage C's latent, as in the nodes."""
        return stage_c_size(self.height, self.width)

    @property
    def compressor(self) -> tuple[int, int]:
        """(height, width) of the picture that the compressor reads."""
        return compressor_size(self.height, self.width)

    def __str__(self) -> str:
        return f"{self.width} × {self.height}"


def buckets(
    size: int,
    step: int,
    max_aspect: float = MAX_ASPECT,
    min_side: int = 0,
    max_side: float = math.inf,
) -> tuple[Bucket, ...]:
    """The square of that side, and every rectangle of no more area whose sides are multiples of `step`.

    min_side, max_side: bounds of the rectangles' sides.
    """
    sizes = {Bucket(size, size)}
    for long in range(-(-size // step) * step, int(size * math.sqrt(max_aspect)) + 1, step):
        short = int(size * size / long) // step * step
        if short and long / short <= max_aspect and min_side <= short and long <= max_side:
            sizes |= {Bucket(short, long), Bucket(long, short)}
    return tuple(sorted(sizes))


def own_bucket(
    height: int, width: int, step: int, max_aspect: float = MAX_ASPECT, min_side: int = 0
) -> Bucket:
    """The largest bucket within a picture: its sides rounded down to multiples of `step`, within the bounds."""
    short = max(min(height, width) // step * step, -(-max(min_side, MIN_BUCKET) // step) * step)
    long = min(max(height, width) // step * step, int(short * max_aspect) // step * step)
    long = max(long, short)
    return Bucket(short, long) if height < width else Bucket(long, short)


@lru_cache(maxsize=100_000)
def nearest(sizes: tuple[Bucket, ...], height: int, width: int) -> Bucket:
    """The bucket whose aspect ratio is nearest to the picture's; the larger of two that are equally near."""
    aspect = math.log(width / height)
    return min(sizes, key=lambda b: (abs(math.log(b.width / b.height) - aspect), -b.height * b.width))
