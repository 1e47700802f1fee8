"""Sizes of pictures and of the latents that they become."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cascade_core.errors import CascadeError
from .api import io
from .hosts.run import LATENT_CHANNELS, STAGE_B_COMPRESSION

COMPRESSION = 42.67  # published: 1024 pixels become 24 latent positions
SIZE_STEP = 8
MAX_SIZE = 16384


def compression_input() -> Any:
    """The same for every node that makes a Stage C latent."""
    return io.Float.Input(
        "compression",
        default=COMPRESSION,
        min=4.0,
        max=128.0,
        step=0.01,
        tooltip=(
            "Pixels for each Stage C position. 42.67 is what the networks were trained on; larger for "
            "large pictures."
        ),
    )


def stage_c_size(height: int, width: int, compression: float) -> tuple[int, int]:
    """(h, w) of the Stage C latent of a picture."""
    if not 4 <= compression <= 128:
        raise CascadeError(f"compression is {compression}; it must lie within 4 and 128 (42.67 is usual).")
    return math.ceil(height / compression), math.ceil(width / compression)


def empty_stage_c(batch: int, height: int, width: int, compression: float) -> dict[str, Tensor]:
    """The Stage C latent, zeros, of pictures of that many pixels."""
    shape = (batch, LATENT_CHANNELS["stage_c"], *stage_c_size(height, width, compression))
    return {"samples": zeros(shape, f"{width} × {height}")}


def empty_stage_b(batch: int, height: int, width: int) -> dict[str, Tensor]:
    """The Stage B latent, zeros, of pictures of that many pixels."""
    shape = (batch, LATENT_CHANNELS["stage_b"], height // STAGE_B_COMPRESSION, width // STAGE_B_COMPRESSION)
    return {"samples": zeros(shape, f"{width} × {height}")}


def zeros(shape: tuple[int, ...], size: str) -> Tensor:
    """An empty latent. size: of the picture, for the message where memory does not suffice."""
    try:
        return torch.zeros(shape)
    except RuntimeError as error:  # torch has no class of its own for this on the CPU
        raise CascadeError(
            f"{shape[0]} latents for pictures of {size} pixels do not fit into memory; choose a smaller size or "
            "batch_size."
        ) from error


def check_size(width: int | None, height: int | None) -> None:
    """A picture's sides are positive multiples of 8. None: not known yet.

    The sentence speaks of both sides, as hosts show it at each input that was looked at.
    """
    sides = {"width": width, "height": height}
    known = {name: pixels for name, pixels in sides.items() if pixels is not None}
    if all(0 < pixels <= MAX_SIZE and pixels % SIZE_STEP == 0 for pixels in known.values()):
        return
    near = {
        name: min(max(round(pixels / SIZE_STEP), 1) * SIZE_STEP, MAX_SIZE) for name, pixels in known.items()
    }
    given, better = (" × ".join(str(chosen.get(name, name)) for name in sides) for chosen in (known, near))
    raise CascadeError(
        f"the size is {given}, but each side must be a multiple of 8 from 8 to {MAX_SIZE}, such as {better}."
    )


def whole_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) of the largest picture within that many pixels whose sides are multiples of 8, at least 8."""
    height, width = (max(side // SIZE_STEP, 1) * SIZE_STEP for side in (height, width))
    return height, width


def chosen_size(own: Sequence[int], height: int, width: int) -> tuple[int, int]:
    """(height, width) that a picture of its `own` is to have: as given, and where one is 0, of its own proportions."""
    if not height and not width:
        return own[0], own[1]
    sides = height or round(own[0] * width / own[1]), width or round(own[1] * height / own[0])
    return whole_size(*sides)


def resized(image: Tensor, size: Sequence[int]) -> Tensor:
    """A picture (B, H, W, C) as RGB of that (height, width), in [0, 1]; of its own size it stays as it is."""
    if tuple(image.shape[1:3]) == tuple(size):
        return image[..., :3]
    pixels = image[..., :3].movedim(-1, 1)
    pixels = F.interpolate(pixels, size=tuple(size), mode="bicubic", antialias=True)
    return pixels.clamp(0, 1).movedim(1, -1)
