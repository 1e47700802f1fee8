"""Decoding in overlapping tiles, for pictures that do not fit whole."""

from collections.abc import Callable

import torch
from torch import Tensor

OVERLAP = 1 / 4  # of a tile's side


def decode_tiled(decode: Callable[[Tensor], Tensor], latent: Tensor, tile: int, upscale: int) -> Tensor:
    """decode(latent) with tiles of `tile` latent positions a side, faded into each other; 0 decodes the
    whole.

    latent: (B, C, h, w) -> (B, 3, h · upscale, w · upscale)
    """
    height, width = latent.shape[-2:]
    if tile < 1 or (height <= tile and width <= tile):
        return decode(latent)
    overlap = max(1, round(tile * OVERLAP))
    image = weights = torch.zeros(())
    for top in _starts(height, tile, overlap):
        for left in _starts(width, tile, overlap):
            piece = decode(latent[..., top : top + tile, left : left + tile])
            if not image.ndim:
                image = piece.new_zeros(*piece.shape[:2], height * upscale, width * upscale)
                weights = image[:1, :1].clone()
            rows = slice(top * upscale, top * upscale + piece.shape[-2])
            columns = slice(left * upscale, left * upscale + piece.shape[-1])
            down, across = (_ramp(length, overlap * upscale, piece) for length in piece.shape[-2:])
            ramp = down[:, None] * across
            image[..., rows, columns] += piece * ramp
            weights[..., rows, columns] += ramp
    return image / weights


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where the tiles begin: as few as cover `length`, the last flush with its end."""
    last = max(length - tile, 0)
    return [*range(0, last, max(tile - overlap, 1)), last]


def _ramp(length: int, fade: int, like: Tensor) -> Tensor:
    """(length,), rising over `fade` positions from each end, never zero."""
    position = torch.arange(length, device=like.device, dtype=like.dtype) + 0.5
    return (torch.minimum(position, length - position) / fade).clamp(max=1)
