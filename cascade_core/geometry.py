"""Sizes: how many positions of each latent belong to a picture of a given size.  All are (height, width)."""

import math
from collections.abc import Sequence

from .errors import CascadeError

STAGE_C_COMPRESSION = (
    42.67  # published: pixels per position of Stage C's latent, a side; 1024 pixels become 24
)
STAGE_B_COMPRESSION = 4  # pixels per position of Stage B's and Stage A's latent, a side
COMPRESSOR_STRIDE = (
    32  # pixels that the compressor, or an EfficientNet ControlNet, reads per position of Stage C's
)
LATENT_CHANNELS = {"stage_c": 16, "stage_b": 4}  # published; other networks state theirs in their config
SIZE_STEP = 8  # the sides of a picture are multiples of it, in pixels
MAX_SIZE = 16384
MAX_PIXELS = MAX_SIZE**2  # of all pictures that are made together: 256 of 1024 × 1024


def stage_c_size(height: int, width: int, compression: float = STAGE_C_COMPRESSION) -> tuple[int, int]:
    """Positions of Stage C's latent of a picture.  Raises CascadeError for a compression out of range."""
    if not 4 <= compression <= 128:
        raise CascadeError(f"compression is {compression}; it must lie within 4 and 128 (42.67 is usual).")
    return math.ceil(height / compression), math.ceil(width / compression)


def stage_b_size(height: int, width: int) -> tuple[int, int]:
    """Positions of Stage B's latent of a picture, which is Stage A's."""
    return height // STAGE_B_COMPRESSION, width // STAGE_B_COMPRESSION


def largest_size(positions: Sequence[int]) -> tuple[int, int]:
    """Pixels of the largest picture, with sides in multiples of 8, whose Stage C latent has these positions."""
    height, width = (math.floor(side * STAGE_C_COMPRESSION) for side in positions)
    return whole_size(height, width)


def compressor_size(height: int, width: int, compression: float = STAGE_C_COMPRESSION) -> tuple[int, int]:
    """Pixels to which a picture is resized for the compressor, so that its latent has Stage C's size."""
    h, w = stage_c_size(height, width, compression)
    return h * COMPRESSOR_STRIDE, w * COMPRESSOR_STRIDE


def whole_size(height: int, width: int) -> tuple[int, int]:
    """Pixels of the largest picture within this size whose sides are multiples of 8, at least 8."""
    return max(height // SIZE_STEP, 1) * SIZE_STEP, max(width // SIZE_STEP, 1) * SIZE_STEP


def check_size(width: int | None, height: int | None) -> None:
    """Raises CascadeError unless a picture's sides are positive multiples of 8.  None: not known yet.

    The sentence names both sides, because hosts show it at each input that was checked.
    """
    sides = {"width": width, "height": height}
    pixels = {name: side for name, side in sides.items() if side is not None}
    if all(0 < side <= MAX_SIZE and side % SIZE_STEP == 0 for side in pixels.values()):
        return
    nearest = {
        name: min(max(round(side / SIZE_STEP), 1) * SIZE_STEP, MAX_SIZE) for name, side in pixels.items()
    }
    wrong, right = (" × ".join(str(size.get(name, name)) for name in sides) for size in (pixels, nearest))
    raise CascadeError(
        f"the size is {wrong}, but each side must be a multiple of 8 from 8 to {MAX_SIZE}, such as {right}."
    )


def check_pixels(width: int, height: int, pictures: int = 1) -> None:
    """Raises CascadeError for pictures with a side above MAX_SIZE, or with more than MAX_PIXELS together."""
    if max(width, height) > MAX_SIZE or width * height * pictures > MAX_PIXELS:
        raise CascadeError(
            f"{pictures:,} picture{'s' * (pictures != 1)} of {width:,} × {height:,} pixels would be made, but no side "
            f"may exceed {MAX_SIZE:,} pixels, nor all together {MAX_PIXELS:,}; make fewer or smaller ones."
        )
