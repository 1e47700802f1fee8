"""Pictures as values: PIL images, paths and tensors become (B, H, W, 3) float32 in [0, 1], sRGB, and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import CascadeError

if TYPE_CHECKING:
    from PIL.Image import Image

Picture = Any  # a PIL image, several of one size, a path, or a tensor (B, H, W, 3) or (H, W, 3) in [0, 1]


def as_image(picture: Image | Tensor | str | Path | Sequence[Image]) -> Tensor:
    """(B, H, W, 3) float32 in [0, 1] of a PIL image, several of one size, a file, or a tensor (…, H, W, C).

    Raises CascadeError for anything else.
    """
    if isinstance(picture, Tensor):
        batch = picture[None] if picture.ndim == 3 else picture
        if batch.ndim != 4 or batch.shape[-1] < 3 or 0 in batch.shape:
            raise CascadeError(
                f"A picture of shape {tuple(picture.shape)} was given; expected (height, width, 3) or "
                "(batch, height, width, 3) in [0, 1]."
            )
        if not picture.is_floating_point():
            raise CascadeError(
                f"A picture was given as a tensor of {picture.dtype}, but floating-point values in [0, 1] are "
                "expected; bytes are divided by 255."
            )
        return _values(batch, "A picture")[..., :3]
    return torch.stack([_channels(image.convert("RGB")) for image in _opened(picture)])


def as_mask(mask: Image | Tensor | str | Path | Sequence[Image]) -> Tensor:
    """(B, H, W) float32 in [0, 1] of a grey picture, white where the picture may change, or of a tensor."""
    if isinstance(mask, Tensor):
        batch = mask[None] if mask.ndim == 2 else mask
        if batch.ndim != 3 or 0 in batch.shape:
            raise CascadeError(
                f"A mask of shape {tuple(mask.shape)} was given; expected (height, width) or (batch, height, width)."
            )
        values = _values(batch, "A mask")
        if not mask.is_floating_point() and values.max() > 1:
            raise CascadeError(
                "A mask of whole numbers goes up to 1, its values do not; divide bytes by 255."
            )
        return values
    return torch.stack([_channels(image.convert("L")) for image in _opened(mask)])


def to_pil(pictures: Tensor) -> list[Image]:
    """(B, H, W, 3) in [0, 1], clipped, as PIL images of 8 bits."""
    from PIL import Image

    values = (255.0 * pictures.detach().float().cpu().numpy()).clip(0, 255).astype("uint8")
    return [Image.fromarray(picture) for picture in values]


def resized(pictures: Tensor, size: Sequence[int]) -> Tensor:
    """Pictures (B, H, W, C) as RGB of that (height, width), in [0, 1]; of their own size they stay as they are."""
    if tuple(pictures.shape[1:3]) == tuple(size):
        return pictures[..., :3]
    pixels = pictures[..., :3].movedim(-1, 1)
    pixels = F.interpolate(pixels, size=tuple(size), mode="bicubic", antialias=True)
    return pixels.clamp(0, 1).movedim(1, -1)


def _opened(picture: Image | str | Path | Sequence[Image]) -> list[Image]:
    """Pictures of one size, read and in 8 bits a channel."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        if isinstance(picture, str | Path):
            with Image.open(picture) as file:
                return [_as_8_bit(ImageOps.exif_transpose(file))]
        images = list(picture) if isinstance(picture, Sequence) else [picture]
        if not images or not all(isinstance(image, Image.Image) for image in images):
            raise CascadeError(
                f"A picture was given as {type(picture).__name__}; give a PIL image, a path or a tensor."
            )
        images = [_as_8_bit(image) for image in images]
    except CascadeError:
        raise
    except (
        OSError,
        SyntaxError,
        ValueError,
        UnidentifiedImageError,
        Image.DecompressionBombError,
    ) as error:
        raise CascadeError(f"The picture {picture} cannot be read: {error}.") from error
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise CascadeError(
            "Pictures of several sizes were given; give pictures of one size, or one at a time."
        )
    if 0 in images[0].size:
        raise CascadeError(f"The picture {picture} has no pixels; give one that has.")
    return images


def _as_8_bit(image: Image) -> Image:
    """Reads a picture, and scales 16-bit greyscale to 8-bit, which Pillow would clip."""
    import numpy as np
    from PIL import Image

    image.load()
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image, dtype=np.int64) // 257).clip(0, 255).astype(np.uint8))
    return image


def _values(tensor: Tensor, subject: str) -> Tensor:
    """A picture or a mask in float32 in main memory. Raises CascadeError where it holds NaN or infinity."""
    values = tensor.detach().to("cpu", torch.float32)
    if not torch.isfinite(values).all():
        raise CascadeError(f"{subject} holds NaN or infinity; make it anew.")
    return values


def _channels(image: Image) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0)
