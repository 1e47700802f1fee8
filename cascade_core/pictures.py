"""Pictures as values: PIL images, paths and tensors become (B, H, W, 3) float32 in [0, 1], sRGB, and back."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import CascadeError, Interrupted, printable, quoted
from .reading import open_regular

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

Picture = Any  # any argument of `as_image`

ROUNDING = 1e-3  # tolerance for values outside of [0, 1]
KINDS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")  # EPS would start another program
FREE_PIXELS = 2**26  # 8192 × 8192: what any file may hold, in all its frames
PIXELS_PER_BYTE = 64  # a larger file may hold this many per byte: far more than photos do
MAX_PIXELS = 2**27  # 134 million, enough for a camera of 100 megapixels
MAX_FRAMES = 4096
MAX_BYTES = 2**30  # MAX_PIXELS of uncompressed 16-bit RGBA
MAX_SCANS = 64  # of a JPEG; a progressive one has about ten
# Markers of JPEG segments that state their length, and of the end.
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")


class PictureError(CascadeError):
    """A picture that cannot be read. reason: why, in a few words, for lists of such pictures."""

    def __init__(self, reason: str, message: str = ""):
        super().__init__(message or reason)
        self.reason = reason


@contextmanager
def open_picture(source: str | Path | bytes) -> Iterator[ImageFile]:
    """Opens a picture as Pillow does: checks its header, but does not decode its pixels, which `upright` does.

    source: a path or a file's bytes. Raises PictureError for kinds other than KINDS, for more pixels than a file of
    that size may hold, and for any other fault of the picture within the block.
    """
    with _bounded(source) as (picture, _):
        yield picture


def read_frames(source: str | Path | bytes) -> list[Image]:
    """Those frames of a picture that have its first one's size, `upright`; of an MPO the first. Raises PictureError."""
    from PIL import ImageSequence

    with _bounded(source) as (picture, limit):
        stored, pixels = [], 0
        for frame in ImageSequence.Iterator(picture):
            pixels += _pixels(frame)
            if pixels > limit or len(stored) == MAX_FRAMES:
                raise ValueError(
                    f"its frames are more than {MAX_FRAMES:,} or have together more than {limit:,} pixels; make "
                    "them smaller or fewer"
                )
            stored.append(frame.copy())
            if picture.format == "MPO":  # the other frames are smaller versions
                break
        frames = [upright(frame) for frame in stored]
    return [frame for frame in frames if frame.size == frames[0].size]


@contextmanager
def _bounded(source: str | Path | bytes) -> Iterator[tuple[ImageFile, int]]:
    """An opened picture, and the limit of the pixels of all its frames."""
    from PIL import Image, UnidentifiedImageError

    name = printable("in memory" if isinstance(source, bytes) else str(source), 300)
    Image.init()
    kinds = [kind for kind in KINDS if kind in Image.OPEN]  # AVIF needs a newer version of Pillow
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open_regular(source) as file:
            file_bytes = file.seek(0, os.SEEK_END)
            if file_bytes > MAX_BYTES:
                raise ValueError(f"its file has {file_bytes:,} bytes, and at most {MAX_BYTES:,} are read")
            file.seek(0)
            if file.read(2) == b"\xff\xd8" and _scans(file.read()) > MAX_SCANS:
                raise ValueError(f"its pixels are refined more than {MAX_SCANS} times; save it anew")
            file.seek(0)
            limit = min(MAX_PIXELS, FREE_PIXELS + PIXELS_PER_BYTE * file_bytes)
            with Image.open(file, formats=kinds) as picture:
                if (pixels := _pixels(picture)) > limit:
                    tile = f" in a tile of {pixels:,}" * (pixels > picture.width * picture.height)
                    raise ValueError(
                        f"it states {picture.width:,} × {picture.height:,} pixels{tile}, and of a file of "
                        f"{file_bytes:,} bytes at most {limit:,} are read; make it smaller"
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


def _pixels(picture: Image) -> int:
    """Pixels in memory while a frame is decoded: its own, or those of a tile of a TIFF if they are more."""
    tags = getattr(picture, "tag_v2", {})
    width, height = tags.get(322, 0), tags.get(323, 0)
    tile = width * height if isinstance(width, int) and isinstance(height, int) else 0
    return max(picture.width * picture.height, tile)


def _scans(jpeg: bytes) -> int:
    """Number of scans in a JPEG (given without its first marker); decoding each may pass over all pixels."""
    count, place = 0, 0
    while count <= MAX_SCANS and (marker := _MARKER.search(jpeg, place)) and marker[0] != b"\xff\xd9":
        count += marker[0] == b"\xff\xda"
        place = marker.end() + int.from_bytes(jpeg[marker.end() : marker.end() + 2], "big")
    return count


def upright(picture: Image) -> Image:
    """A picture's pixels, turned by its EXIF orientation, in 8 bits a channel."""
    from PIL import ImageOps

    return as_8_bit(ImageOps.exif_transpose(picture))


def as_image(picture: Picture, name: str = "The picture") -> Tensor:
    """(B, H, W, 3) float32 in [0, 1] of a picture, or of several of one size.

    picture  a PIL image, turned by its EXIF orientation; a path, or a file's bytes; a tensor or array (H, W), (H, W, C)
             or (B, H, W, C), C = 1, 3 or 4, of floats in [0, 1] or of uint8; or a list of these
    name     of the argument, for messages

    Alpha is left out. Raises CascadeError for anything else.
    """
    return _joined(picture, name, _rgb)


def as_mask(mask: Picture, name: str = "The mask") -> Tensor:
    """(B, H, W) float32 in [0, 1] of a mask, white where the picture may change, or of several of one size.

    mask  a picture, which is read as grey; a tensor or array (H, W) or (B, H, W) of floats or whole numbers in [0, 1],
          of bool, or of uint8 up to 255; or a list of these
    name  of the argument, for messages
    """
    return _joined(mask, name, _grey)


def finite_values(tensor: Tensor, name: str) -> Tensor:
    """A tensor's values in float32 in main memory.

    Raises CascadeError where it holds NaN or infinity, and for a kind of tensor that cannot be read as dense real
    values.
    """
    kind = next((kind for kind, is_kind in _WITHOUT_VALUES.items() if is_kind(tensor)), None)
    if kind is not None:
        raise CascadeError(f"{name} is a {kind} tensor; give a dense one of real numbers.")
    try:
        values = tensor.detach().to("cpu", torch.float32)
    except RuntimeError:  # a dtype for storage only
        raise CascadeError(f"{name} is a tensor of {tensor.dtype}; give one of floats.") from None
    if not torch.isfinite(values).all():
        raise CascadeError(f"{name} holds NaN or infinity; make it anew.")
    return values


_WITHOUT_VALUES: dict[str, Callable[[Tensor], bool]] = {
    "meta": lambda tensor: tensor.is_meta,
    "nested": lambda tensor: tensor.is_nested,
    "sparse": lambda tensor: tensor.layout != torch.strided,
    "quantized": lambda tensor: tensor.is_quantized,
    "complex": lambda tensor: tensor.is_complex(),
}


def to_pil(pictures: Tensor) -> list[Image]:
    """(B, H, W, 3) in [0, 1], clipped, as PIL images of 8 bits."""
    from PIL import Image

    values = (255.0 * pictures.detach().float().cpu().numpy()).clip(0, 255).astype("uint8")
    return [Image.fromarray(picture) for picture in values]


def resized(pictures: Tensor, size: Sequence[int]) -> Tensor:
    """Pictures (B, H, W, C) as RGB of that (height, width), in [0, 1]; pictures of that size are returned unchanged."""
    if tuple(pictures.shape[1:3]) == tuple(size):
        return pictures[..., :3]
    pixels = pictures[..., :3].movedim(-1, 1)
    pixels = F.interpolate(pixels, size=tuple(size), mode="bicubic", antialias=True)
    return pixels.clamp(0, 1).movedim(1, -1)


def _joined(pictures: Picture, name: str, read: Callable[[Any, str], Tensor]) -> Tensor:
    """A picture as read, or the pictures of a list in one batch."""
    if not isinstance(pictures, list | tuple):
        return read(pictures, name)
    if not pictures:
        raise CascadeError(f"{name} is an empty list; give at least one picture.")
    batches = [read(picture, name) for picture in pictures]
    if len({batch.shape[1:] for batch in batches}) > 1:
        raise CascadeError(
            f"{name} holds pictures of several sizes; give pictures of one size, or one at a time."
        )
    return torch.cat(batches)


def _rgb(picture: Any, name: str) -> Tensor:
    """(B, H, W, 3)"""
    if not isinstance(picture, Tensor | np.ndarray):
        return _channels(_opened(picture, name, "RGB"))[None]
    values, dtype = _numbers(picture, name)
    batch = values[..., None] if values.ndim == 2 else values
    batch = batch[None] if batch.ndim == 3 else batch
    if batch.ndim != 4 or batch.shape[-1] not in (1, 3, 4) or 0 in batch.shape:
        raise CascadeError(
            f"{name} has the shape {quoted(tuple(values.shape))}; give (height, width, 3) or (batch, height, width, 3)."
        )
    if dtype == torch.uint8:
        batch = batch / 255
    elif not dtype.is_floating_point:
        raise CascadeError(f"{name} holds values of {dtype}; {_EXPECTED}")
    _check_range(batch, name)
    return batch.expand(-1, -1, -1, 3) if batch.shape[-1] == 1 else batch[..., :3]


def _grey(mask: Any, name: str) -> Tensor:
    """(B, H, W)"""
    if not isinstance(mask, Tensor | np.ndarray):
        return _channels(_opened(mask, name, "L"))[None]
    values, dtype = _numbers(mask, name)
    batch = values[..., 0] if values.ndim > 2 and values.shape[-1] == 1 else values
    batch = batch[None] if batch.ndim == 2 else batch
    if batch.ndim != 3 or 0 in batch.shape:
        raise CascadeError(
            f"{name} has the shape {quoted(tuple(values.shape))}; give (height, width) or (batch, height, width)."
        )
    if dtype == torch.uint8 and batch.max() > 1:
        batch = batch / 255
    _check_range(batch, name)
    return batch


_EXPECTED = "give floats from 0 to 1, or uint8 from 0 to 255."


def _numbers(values: Tensor | np.ndarray, name: str) -> tuple[Tensor, torch.dtype]:
    """A tensor's or an array's finite values as a tensor, and their former dtype."""
    if isinstance(values, np.ndarray):
        try:  # torch takes neither negative strides nor a foreign byte order, and warns of read-only memory
            values = torch.from_numpy(np.array(values, values.dtype.newbyteorder("="), order="C"))
        except TypeError:
            raise CascadeError(
                f"{name} is an array of {printable(str(values.dtype), 80)}; {_EXPECTED}"
            ) from None
    return finite_values(values, name), values.dtype


def _check_range(values: Tensor, name: str) -> None:
    low, high = (bound.item() for bound in values.aminmax())
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise CascadeError(f"{name} holds values from {low:.4g} to {high:.4g}; {_EXPECTED}")


def _opened(picture: Any, name: str, mode: str) -> Image:
    """A picture converted to a mode of Pillow; of a file, the first frame."""
    from PIL import Image

    if isinstance(picture, str | os.PathLike | bytes):
        if isinstance(picture, str) and "://" in picture:
            raise CascadeError(f"{name} is the address {quoted(picture)}; download it, and give its path.")
        with open_picture(picture if isinstance(picture, bytes) else os.fsdecode(picture)) as file:
            return upright(file).convert(mode)
    if not isinstance(picture, Image.Image):
        raise CascadeError(
            f"{name} is of type {type(picture).__name__}; give a PIL image, a path, a tensor or an array."
        )
    if 0 in picture.size:
        raise CascadeError(f"{name} has no pixels; give one that has.")
    try:
        return upright(picture).convert(mode)
    except Exception as error:  # Pillow's readers let through whatever they meet in a damaged file
        reason = printable(str(error) or type(error).__name__)
        raise CascadeError(f"{name} cannot be read: {reason}.") from error


def as_8_bit(image: Image) -> Image:
    """Reads a picture, and scales 16-bit greyscale to 8-bit, which Pillow would clip."""
    from PIL import Image

    image.load()
    if image.mode == "F" and not _fills_bytes(image):
        raise ValueError("it holds floating-point values that do not go from 0 to 255; save it in 8 bits")
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    return image


def _fills_bytes(image: Image) -> bool:
    """Whether floats can be meant as 0 to 255, as Pillow reads them: those up to 1 would come out black."""
    values = np.asarray(image)
    return bool(values.min() >= 0 and (values.max() == 0 or 1 < values.max() <= 255))


def _channels(image: Image) -> Tensor:
    values = np.array(image, dtype=np.float32)
    values /= 255.0  # in place: a large picture takes gigabytes
    return torch.from_numpy(values)
