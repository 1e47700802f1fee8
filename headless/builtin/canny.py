"""The edges of ComfyUI's Canny node: the detector of Canny (1986) in floating point, as in kornia.

Grey by luma, a Gaussian blur of 5 × 5 pixels with deviation 1, Sobel's gradient (not normalised), non-maximum
suppression along one of eight directions, hysteresis. `cascade_core/hints/canny.py` is the published filter, of whole
numbers, on which the ControlNet was trained.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ...cascade_core.hints.canny import connected

_LUMA = (0.299, 0.587, 0.114)
_FLAT = 1e-6  # added under the root of the squared gradient
# Neighbours by direction, from the right on in steps of 45°, the y axis pointing down: (down, right).
_NEIGHBOURS = ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1))
_RIGHT, _DOWN = 0, 2  # of equal pixels along an axis the left or the upper one is kept


def canny_edges(images: Tensor, low: float, high: float) -> Tensor:
    """The edges of images (B, 1 or 3, H, W) in [0, 1] as bool (B, 1, H, W)."""
    dx, dy = _gradient(_blurred(_grey(images)))
    magnitude = (dx * dx + dy * dy + _FLAT).sqrt()
    thin = _is_ridge(magnitude, dx, dy)
    return connected(strong=thin & (magnitude > high), weak=thin & (magnitude > low))


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images
    red, green, blue = (images[:, index : index + 1] for index in range(3))
    return _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue


def _blurred(grey: Tensor) -> Tensor:
    """(B, 1, H, W), with the pixels mirrored beyond the border."""
    places = torch.arange(-2, 3, dtype=torch.float32)
    weights = (-places * places / 2).exp()
    weights = (weights / weights.sum()).to(grey)
    across = F.conv2d(_mirrored(grey, 3), weights.view(1, 1, 1, 5))
    return F.conv2d(_mirrored(across, 2), weights.view(1, 1, 5, 1))


def _mirrored(pixels: Tensor, dim: int) -> Tensor:
    """Pads a dimension by two mirrored pixels on each side; the pixels of a thin picture are repeated first."""
    size = pixels.shape[dim]
    places = torch.arange(-2, size + 2, device=pixels.device)
    period = max(2 * (size - 1), 1)
    places = places.remainder(period)
    return pixels.index_select(dim, torch.minimum(places, period - places).clamp(max=size - 1))


def _gradient(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Sobel dx and dy (B, 1, H, W); border pixels are repeated outside the image."""
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]).to(pixels)
    kernels = torch.stack([kernel, kernel.T])[:, None]
    dx, dy = F.conv2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), kernels).chunk(2, dim=1)
    return dx, dy


def _is_ridge(magnitude: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """Where the gradient is the largest of three along its direction; False where it is zero."""
    H, W = magnitude.shape[-2:]
    direction = (torch.atan2(dy, dx) * (4 / math.pi)).round().long() % 8
    flat = math.sqrt(_FLAT)
    padded = F.pad(magnitude, (1, 1, 1, 1), value=flat)
    neighbours = torch.stack(
        [padded[..., 1 + down : 1 + down + H, 1 + right : 1 + right + W] for down, right in _NEIGHBOURS]
    )
    ridge = magnitude > torch.tensor(flat)
    for towards in (direction, (direction + 4) % 8):
        neighbour = neighbours.gather(0, towards[None])[0]
        tie = ((towards == _RIGHT) | (towards == _DOWN)) & (magnitude == neighbour)
        ridge &= (magnitude > neighbour) | tie
    return ridge
