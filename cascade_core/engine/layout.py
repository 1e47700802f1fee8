"""Feature maps as tokens (B, N, C), N = height · width, and as images, with the copies between the two.

Copies are made in the forward's workspace.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .workspace import empty

Size = tuple[int, int]  # height and width in positions


def as_tokens(image: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H·W, C) contiguous; a view of channels-last memory"""
    return _contiguous(image.permute(0, 2, 3, 1)).flatten(1, 2)


def as_image(tokens: Tensor, size: Size) -> Tensor:
    """(B, H·W, C) -> (B, C, H, W) in channels-last memory, a view"""
    return tokens.unflatten(1, size).permute(0, 3, 1, 2)


def unshuffle(image: Tensor, side: int) -> Tensor:
    """PixelUnshuffle to tokens: (B, C, H, W) -> (B, H/side · W/side, C · side²)"""
    height, width = image.shape[-2] // side, image.shape[-1] // side
    pixels = image.unflatten(3, (width, side)).unflatten(2, (height, side))  # (B, C, h, side, w, side)
    return _contiguous(pixels.permute(0, 2, 4, 1, 3, 5)).flatten(3).flatten(1, 2)


def shuffle(tokens: Tensor, size: Size, side: int) -> Tensor:
    """PixelShuffle of tokens: (B, N, C · side²) at `size` -> (B, C, H · side, W · side) in channels-last memory"""
    pixels = tokens.unflatten(1, size).unflatten(3, (-1, side, side))  # (B, h, w, C, side, side)
    image = _contiguous(pixels.permute(0, 1, 4, 2, 5, 3))
    return image.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def patches(tokens: Tensor, size: Size) -> Tensor:
    """Squares of 2 × 2 positions, without an odd last row or column: (B, N, C) at `size` -> (B, N / 4, 4C)"""
    height, width = size[0] // 2, size[1] // 2
    image = tokens.unflatten(1, size)[:, : 2 * height, : 2 * width]
    squares = image.unflatten(2, (width, 2)).unflatten(1, (height, 2)).transpose(2, 3)  # (B, h, w, 2, 2, C)
    return _contiguous(squares).flatten(3).flatten(1, 2)


def unpatched(tokens: Tensor, size: Size) -> Tensor:
    """The reverse of `patches`: (B, N, 4C) at `size` -> (B, 4N, C)"""
    squares = tokens.unflatten(1, size).unflatten(3, (2, 2, -1)).transpose(2, 3)  # (B, h, 2, w, 2, C)
    return _contiguous(squares).flatten(1, 4)


def resized(image: Tensor, size: Size, like: Tensor) -> Tensor:
    """`networks.layers.resize` to tokens in the precision of `like`: (B, C, h, w) -> (B, H·W, C)"""
    if tuple(image.shape[-2:]) != size:
        image = interpolated(_contiguous(image.permute(0, 2, 3, 1), torch.float32).permute(0, 3, 1, 2), size)
    return _contiguous(image.permute(0, 2, 3, 1), like.dtype).flatten(1, 2)


def concatenated(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """(B, N, C) and (B, N, C_skip) -> (B, N, C + C_skip), or (B, N, C) and (B, T, C) -> (B, N + T, C)"""
    shape = list(first.shape)
    shape[dim] += second.shape[dim]
    return torch.cat([first, second], dim=dim, out=empty(shape, first))


def interpolated(image: Tensor, size: Size) -> Tensor:
    """Bilinear with aligned corners, in the image's own precision.  (B, C, h, w) -> (B, C, H, W), both channels-last"""
    out = empty((len(image), *size, image.shape[1]), image).permute(0, 3, 1, 2)
    return torch.ops.aten.upsample_bilinear2d.out(image, size, True, out=out)


def _contiguous(view: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The view itself where it is contiguous and of this dtype, else a copy."""
    if view.is_contiguous() and view.dtype == (dtype or view.dtype):
        return view
    return empty(view.shape, view, dtype).copy_(view)
