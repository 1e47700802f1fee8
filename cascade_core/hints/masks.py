"""Masks for inpainting and outpainting, at a latent's size or with soft edges; and compositing."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import CascadeError
from .filters import mask_of


def latent_mask(mask: Tensor, batch: int, size: Sequence[int], grow: int = 0, soft: bool = False) -> Tensor:
    """Resizes a mask (B or 1, H, W) to a latent of h × w positions: (batch, 1, h, w), 0 or 1, and with `soft` also
    between.

    A position may change if it is masked more than half as much as the most masked one, or lies within `grow`
    positions of such a one.  Grow the mask only with the inpainting ControlNet; without it, content spills into the
    grown area and is cut off.
    """
    mask = mask_of(mask, batch, (mask.shape[-2], mask.shape[-1])).clamp(0, 1)
    share = F.adaptive_avg_pool2d(mask, (size[0], size[1]))
    changeable = share if soft else (share > share.amax(dim=(1, 2, 3), keepdim=True) / 2).float()
    return F.max_pool2d(changeable, 2 * grow + 1, stride=1, padding=grow)


def expand(
    images: Tensor, left: int, top: int, right: int, bottom: int, feather: int
) -> tuple[Tensor, Tensor]:
    """Adds room around a picture; returns it with the mask of the area to paint.

    images: (B, C, H, W) -> (B, C, top + H + bottom, left + W + right), its border pixels repeated, and a mask (1, H',
    W'):
    1 in the new part, falling to 0 over `feather` pixels of the old one.
    """
    if min(left, top, right, bottom, feather) < 0:
        raise CascadeError("left, top, right, bottom and feather are pixels; none can be below 0.")
    height, width = images.shape[-2:]
    padded = F.pad(images, (left, right, top, bottom), mode="replicate")
    rows = _distances(height, top, bottom, feather)  # (top + H + bottom,)
    columns = _distances(width, left, right, feather)
    depth = torch.minimum(rows[:, None], columns[None, :])  # inside the old picture, from 0 at its new edges
    return padded, (1 - depth)[None]


def _distances(length: int, before: int, after: int, feather: int) -> Tensor:
    """Ramp along a side: 0 in the room, rising to 1 over the next `feather` pixels; none at ends without room."""
    position = torch.arange(length) + 0.5
    inside = torch.ones(length)
    for room, distance in ((before, position), (after, length - position)):
        if room and feather:
            inside = torch.minimum(inside, distance / feather)
    return F.pad(inside, (before, after))


def fade_inwards(mask: Tensor, width: int) -> Tensor:
    """Softens a mask (B, 1, H, W) inwards: from 0 at its edge to its own value `width` pixels inside.

    The picture's border is not an edge.
    """
    outside = 1 - mask.clamp(0, 1)
    total = outside.clone()
    for _ in range(width):
        outside = F.max_pool2d(outside, 3, stride=1, padding=1)
        total += outside
    return 1 - total / (width + 1)


def composite(result: Tensor, source: Tensor, mask: Tensor, feather: int) -> Tensor:
    """Blends the result into the source by a mask; where it is 0, the source stays bit for bit.

    result: (B, C, h, w), resized to the source; source: (B or 1, C, H, W); mask: (B or 1, h, w); feather: pixels
    inside the mask over which the one becomes the other -> (B, C, H, W).
    """
    batch = max(len(result), len(source))
    if len(source) not in (1, batch) or len(result) not in (1, batch):
        raise CascadeError(
            f"{len(result)} results came with {len(source)} sources; give one source, or one for each result."
        )
    size = (source.shape[-2], source.shape[-1])
    if result.shape[-2:] != size:
        result = F.interpolate(result, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    weight = fade_inwards(mask_of(mask, batch, size), feather).to(source)
    return torch.where(weight > 0, torch.lerp(source, result.to(source), weight), source)
