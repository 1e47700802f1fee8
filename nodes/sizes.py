"""What nodes do with sizes: the input for the compression, empty latents, resized pictures."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cascade_core.errors import CascadeError
from ..cascade_core.geometry import (
    LATENT_CHANNELS,
    STAGE_C_COMPRESSION,
    stage_b_size,
    stage_c_size,
    whole_size,
)
from .api import io


def compression_input() -> Any:
    """The same for every node that makes a Stage C latent."""
    return io.Float.Input(
        "compression",
        default=STAGE_C_COMPRESSION,
        min=4.0,
        max=128.0,
        step=0.01,
        tooltip=(
            "Pixels for each Stage C position. 42.67 is what the networks were trained on; larger for "
            "large pictures."
        ),
    )


def empty_stage_c(batch: int, height: int, width: int, compression: float) -> dict[str, Tensor]:
    """The Stage C latent, zeros, of pictures of that many pixels."""
    shape = (batch, LATENT_CHANNELS["stage_c"], *stage_c_size(height, width, compression))
    return {"samples": zeros(shape, f"{width} × {height}")}


def empty_stage_b(batch: int, height: int, width: int) -> dict[str, Tensor]:
    """The Stage B latent, zeros, of pictures of that many pixels."""
    shape = (batch, LATENT_CHANNELS["stage_b"], *stage_b_size(height, width))
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
