"""Sizes in nodes: the compression input, empty latents, and sizes of pictures."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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
    """Compression input, shared by all nodes that make a Stage C latent."""
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


def empty_stage_c(batch: int, height: int, width: int, compression: float) -> dict[str, Any]:
    """Zero Stage C latent of pictures of height × width pixels, with its compression stored in it."""
    shape = (batch, LATENT_CHANNELS["stage_c"], *stage_c_size(height, width, compression))
    return {"samples": zeros(shape, f"{width} × {height}"), "compression": compression}


def empty_stage_b(batch: int, height: int, width: int) -> dict[str, Tensor]:
    """Zero Stage B latent of pictures of height × width pixels."""
    shape = (batch, LATENT_CHANNELS["stage_b"], *stage_b_size(height, width))
    return {"samples": zeros(shape, f"{width} × {height}")}


def zeros(shape: tuple[int, ...], size: str) -> Tensor:
    """Zero latent. size: of the picture, for the message where memory does not suffice."""
    try:
        return torch.zeros(shape)
    except RuntimeError as error:  # on the CPU, torch has no exception class for this
        raise CascadeError(
            f"{shape[0]} latents for pictures of {size} pixels do not fit into memory; choose a smaller size or "
            "batch_size."
        ) from error


def chosen_size(picture_size: Sequence[int], height: int, width: int) -> tuple[int, int]:
    """Target (height, width) of a picture of `picture_size`; a side of 0 is computed from its proportions."""
    if not height and not width:
        return picture_size[0], picture_size[1]
    sides = (
        height or round(picture_size[0] * width / picture_size[1]),
        width or round(picture_size[1] * height / picture_size[0]),
    )
    return whole_size(*sides)


def picture_report(image: Tensor) -> dict[str, Any]:
    """Data for a node's panel about its picture (B, H, W, C), which may come from any other node."""
    return {"cascade_picture": [{"width": image.shape[2], "height": image.shape[1]}]}
