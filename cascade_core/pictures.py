"""Pictures as values: PIL images, paths and tensors become (B, H, W, 3) float32 in [0, 1], sRGB, and back."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import CascadeError, Interrupted, printable, quoted
from .reading import open_regular

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

Picture = Any  # a PIL image, several of one size, a path, or a tensor (B, H, W, 3) or (H, W, 3) in [0, 1]


KINDS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")  # an EPS would start another program
FREE_PIXELS = 2**26  # 8192 × 8192: what any file may hold, all frames together …
PIXELS_PER_BYTE = 64  # … and for each of its bytes, far more than photographs and drawings have
MAX_PIXELS = 2**27  # 134 million: a camera of 100 million fits
MAX_FRAMES = 4096
MAX_BYTES = 2**30  # MAX_PIXELS of 16-bit RGBA as they are


class PictureError(CascadeError):
    """A picture that cannot be read. reason: why, in a few words, for lists of such pictures."""

    def __init__(self, reason: str, message: str = ""):
        super().__init__(message or reason)
        self.reason = reason


@contextmanager
def open_picture(source: str | Path | bytes, name: str | None = None) -> Iterator[ImageFile]:
    """Open a picture as Pillow does: its header is checked, its pixels are not decoded yet; `upright` does so.

    source: a path or a file's bytes; name: what messages call it. Other kinds than KINDS, more pixels than a file of
    that size may hold, and whatever else is wrong with the picture within the block raise PictureError.
    """
    with _bounded(source, name) as (picture, _):
        yield picture


def read_frames(source: str | Path | bytes, name: str | None = None) -> list[Image]:
    """A picture's frames of the first one's size, `upright`; a photograph's (MPO) is one. Raises PictureError."""
    from PIL import ImageSequence

    with _bounded(source, name) as (picture, limit):
        stored, pixels = [], 0
        for frame in ImageSequence.Iterator(picture):
            pixels += frame.width * frame.height
            if pixels > limit or len(stored) == MAX_FRAMES:
                raise ValueError(
                    f"its frames are more than {MAX_FRAMES:,} or have together more than {limit:,} pixels; make "
                    "them smaller or fewer"
                )
            stored.append(frame.copy())
            if picture.format == "MPO":  # what follows are smaller versions
                break
        frames = [upright(frame) for frame in stored]
    return [frame for frame in frames if frame.size == frames[0].size]


@contextmanager
def _bounded(source: str | Path | bytes, name: str | None) -> Iterator[tuple[ImageFile, int]]:
    """An opened picture, and how many pixels its frames may have together."""
    from PIL import Image, UnidentifiedImageError

    name = printable(name or ("in memory" if isinstance(source, bytes) else str(source)), 300)
    Image.init()
    kinds = [kind for kind in KINDS if kind in Image.OPEN]  # AVIF comes with newer versions of Pillow alone
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open_regular(source) as file:
            file_bytes = file.seek(0, os.SEEK_END)
            if file_bytes > MAX_BYTES:
                raise ValueError(f"its file has {file_bytes:,} bytes, and at most {MAX_BYTES:,} are read")
            file.seek(0)
            limit = min(MAX_PIXELS, FREE_PIXELS + PIXELS_PER_BYTE * file_bytes)
            with Image.open(file, formats=kinds) as picture:
                if picture.width * picture.height > limit:
                    raise ValueError(
                        f"it states {picture.width:,} × {picture.height:,} pixels, and of a file of {file_bytes:,} "
                        f"bytes at most {limit:,} are read; make it smaller"
                    )
                if 0 in picture.size:
                    raise ValueError("it has no pixels")
                yield picture, limit
    except (CascadeError, Interrupted):
        raise
    except UnidentifiedImageError:
        raise PictureError(
            "not a picture", f"{name} is not a picture; PNG, JPEG or WebP was expected."
        ) from None
    except Exception as error:  # Pillow's readers let through whatever they meet in a damaged file
        plain = error.strerror if isinstance(error, OSError) else None
        reason = printable(plain or str(error) or type(error).__name__, 200)
        raise PictureError(reason, f"The picture {name} cannot be read: {reason}.") from error


def upright(picture: Image) -> Image:
    """A picture's pixels, turned by its EXIF orientation, in 8 bits a channel."""
    from PIL import ImageOps

    return as_8_bit(ImageOps.exif_transpose(picture))


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
    """Pictures of one size, read and in 8 bits a channel; a file's first frame."""
    from PIL import Image

    if isinstance(picture, str | Path):
        with open_picture(picture) as file:
            return [upright(file)]
    images = list(picture) if isinstance(picture, Sequence) else [picture]
    if not images or not all(isinstance(image, Image.Image) for image in images):
        raise CascadeError(
            f"A picture was given as {type(picture).__name__}; give a PIL image, a path or a tensor."
        )
    try:
        images = [as_8_bit(image) for image in images]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise CascadeError(f"The picture {quoted(picture)} cannot be read: {error}.") from error
    if len({image.size for image in images}) != 1:
        raise CascadeError(
            "Pictures of several sizes were given; give pictures of one size, or one at a time."
        )
    if 0 in images[0].size:
        raise CascadeError(f"The picture {quoted(picture)} has no pixels; give one that has.")
    return images


def as_8_bit(image: Image) -> Image:
    """Reads a picture, and scales 16-bit greyscale to 8-bit, which Pillow would clip."""
    import numpy as np
    from PIL import Image

    image.load()
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    return image


def _values(tensor: Tensor, subject: str) -> Tensor:
    """A picture or a mask in float32 in main memory. Raises CascadeError where it holds NaN or infinity."""
    values = tensor.detach().to("cpu", torch.float32)
    if not torch.isfinite(values).all():
        raise CascadeError(f"{subject} holds NaN or infinity; make it anew.")
    return values


def _channels(image: Image) -> Tensor:
    import numpy as np

    values = np.array(image, dtype=np.float32)
    values /= 255.0  # in place: a large picture takes gigabytes
    return torch.from_numpy(values)
