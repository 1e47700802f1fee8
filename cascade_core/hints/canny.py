"""The hint of the published Canny ControlNet, without OpenCV.

The edge detector of Canny (1986, "A Computational Approach to Edge Detection") in the integer arithmetic and
with the tie rules of OpenCV's `Canny` (aperture 3, L1 gradient), so that the hint is the one the published
network was trained on, pixel for pixel.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import CascadeError

SHIFT = 15  # fixed-point bits
TAN_22_5 = 13573  # tan(22.5°) · 2^15, rounded
FURTHER = 16  # pixels by which edges grow between two checks that they still grow


def canny_hint(images: Tensor, low: int = 100, high: int = 200, size: int = 224) -> Tensor:
    """The edges of images (B, 3, H, W) in [0, 1] as (B, 1, H, W) in [0, 1], float32, on the images' device.

    The edges are found at size × size pixels, the published filter's 224, and resized back, so their lines
    are soft.  `low` and `high` bound the hysteresis, in units of the 8-bit gradient |dx| + |dy|.  All is
    computed on the CPU: other devices round differently when resizing, so that an 8-bit pixel might differ. Raises
    CascadeError for another shape, an integer image, or thresholds out of order.
    """
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise CascadeError(
            f"The Canny hint got images of shape {tuple(images.shape)}, {images.dtype}, but expects RGB images "
            "(B, 3, H, W) as floats in [0, 1]. Convert them first."
        )
    pixels = images.detach().to("cpu", torch.float32)
    pixels = F.interpolate(pixels, size=(size, size), mode="bilinear")
    pixels = pixels.mul(255).clamp(0, 255).to(torch.uint8)  # truncated, not rounded, as published
    edges = canny(pixels, low, high).float()
    return F.interpolate(edges, size=tuple(images.shape[-2:]), mode="bilinear").to(images.device)


def canny(pixels: Tensor, low: int, high: int) -> Tensor:
    """The edges of 8-bit images (B, C, H, W) as a bool mask (B, 1, H, W): OpenCV's `Canny(image, low, high)`."""
    if not 0 <= low <= high:
        raise CascadeError(
            f"The Canny thresholds are low {low} and high {high}, but must be 0 <= low <= high. "
            "Give the smaller one as low."
        )
    dx, dy = _strongest_gradient(pixels)
    gradient = dx.abs() + dy.abs()
    thin = _is_ridge(gradient, dx, dy)
    return connected(strong=thin & (gradient > high), weak=thin & (gradient > low))


def _strongest_gradient(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Sobel dx and dy, each int32 (B, 1, H, W), of every pixel's channel with the largest |dx| + |dy|.

    The image's border pixels are repeated outside it.  The first of equal channels wins.
    """
    p = F.pad(pixels.float(), (1, 1, 1, 1), mode="replicate").to(torch.int32)  # (B, C, H + 2, W + 2)
    down = p[..., :-2, :] + 2 * p[..., 1:-1, :] + p[..., 2:, :]  # (B, C, H, W + 2)
    across = p[..., :-2] + 2 * p[..., 1:-1] + p[..., 2:]  # (B, C, H + 2, W)
    dx = down[..., 2:] - down[..., :-2]  # (B, C, H, W)
    dy = across[..., 2:, :] - across[..., :-2, :]
    best_dx, best_dy = dx[:, :1], dy[:, :1]
    for c in range(1, pixels.shape[1]):
        channel_dx, channel_dy = dx[:, c : c + 1], dy[:, c : c + 1]
        larger = channel_dx.abs() + channel_dy.abs() > best_dx.abs() + best_dy.abs()
        best_dx, best_dy = torch.where(larger, channel_dx, best_dx), torch.where(larger, channel_dy, best_dy)
    return best_dx, best_dy


def _is_ridge(gradient: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """Non-maximum suppression: True where the gradient is largest along its direction (one of four); (B, 1, H, W).

    Of two equal neighbours along an axis, the left or upper one is kept; on a diagonal neither is.  Outside
    the image the gradient is 0.
    """
    H, W = gradient.shape[-2:]
    padded = F.pad(gradient, (1, 1, 1, 1))

    def neighbour(down: int, right: int) -> Tensor:
        return padded[..., 1 + down : 1 + down + H, 1 + right : 1 + right + W]

    x, y = dx.abs(), dy.abs() << SHIFT
    tan_22 = x * TAN_22_5
    tan_67 = tan_22 + (x << (SHIFT + 1))  # tan(67.5°) = tan(22.5°) + 2
    horizontal, vertical = y < tan_22, y > tan_67
    falling = (dx ^ dy) >= 0  # the gradient points to the lower right or the upper left
    ridge_x = (gradient > neighbour(0, -1)) & (gradient >= neighbour(0, 1))
    ridge_y = (gradient > neighbour(-1, 0)) & (gradient >= neighbour(1, 0))
    ridge_falling = (gradient > neighbour(-1, -1)) & (gradient > neighbour(1, 1))
    ridge_rising = (gradient > neighbour(-1, 1)) & (gradient > neighbour(1, -1))
    diagonal = torch.where(falling, ridge_falling, ridge_rising)
    return torch.where(horizontal, ridge_x, torch.where(vertical, ridge_y, diagonal))


def connected(strong: Tensor, weak: Tensor) -> Tensor:
    """The weak pixels that a chain of weak pixels, through any of 8 neighbours, joins to a strong one.

    `strong` is part of `weak`; bool (B, 1, H, W).
    """
    edges, count = strong, -1
    # Reading a count makes the host wait for an accelerator, so there edges grow by several pixels between checks.
    further = 1 if edges.device.type == "cpu" else FURTHER
    while (now := int(edges.sum())) != count:
        count = now
        for _ in range(further):
            edges = _dilated(edges) & weak
    return edges


def _dilated(mask: Tensor) -> Tensor:
    """`mask` (B, 1, H, W), bool, grown by a pixel to all 8 neighbours; on bytes, which is many times faster than max
    pooling of floats.
    """
    padded = F.pad(mask, (0, 0, 1, 1))
    rows = padded[:, :, :-2] | mask | padded[:, :, 2:]
    padded = F.pad(rows, (1, 1))
    return padded[..., :-2] | rows | padded[..., 2:]
