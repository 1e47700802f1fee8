"""Reads pictures from files: RGB, upright, cropped to their centre, at a bucket's size."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from ...errors import printable
from ...pictures import MAX_BYTES, PictureError, as_8_bit, open_picture
from ...reading import open_regular
from .buckets import Bucket

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif")
NOT_READ = (  # unsupported kinds of pictures, which are reported; other files are ignored
    ".arw", ".cr2", ".cr3", ".dng", ".eps", ".exr", ".gif", ".hdr", ".heic", ".heif", ".hif", ".ico", ".jfif", ".jp2",
    ".jpe", ".jxl", ".kra", ".nef", ".orf", ".pbm", ".pgm", ".ppm", ".psb", ".psd", ".qoi", ".raf", ".raw", ".rw2",
    ".svg", ".tga", ".xcf",
)  # fmt: skip
# 0001.prompt0.png is an image prompt of 0001.png.
IMAGE_PROMPT = re.compile(r"(.*)\.prompt(\d{1,4})", re.DOTALL)
MASKS = (".mask", "-masklabel")  # 0001.mask.png is the mask of 0001.png; the second suffix is OneTrainer's
ORIENTATION = 0x0112  # EXIF tag
# How a picture is turned upright, by the tag's value (EXIF 2.3, section 4.6.4).
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LYING = (5, 6, 7, 8)  # stored with width and height exchanged
SAME_ASPECT = 0.03  # in logarithms: tolerance for a mask whose sides were rounded to pixels


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A picture's bytes within a file."""

    name: str  # for messages: its path within the folder, or the tar's path and its own
    path: Path  # the file that holds it
    offset: int  # bytes
    length: int
    stamp: int  # when the file was last changed, in nanoseconds

    @property
    def identity(self) -> str:
        """A text that changes whenever the picture may have changed."""
        return f"{self.path}\n{self.offset}\n{self.length}\n{self.stamp}"

    def read(self, at_most: int | None = None) -> bytes:
        """The picture's bytes, or the first of them. Raises PictureError."""
        if at_most is None and self.length > MAX_BYTES:
            raise PictureError(f"its file has {self.length:,} bytes, and at most {MAX_BYTES:,} are read")
        try:
            with open_regular(self.path) as file:
                file.seek(self.offset)
                return file.read(self.length if at_most is None else min(at_most, self.length))
        except OSError as error:
            raise PictureError(error.strerror or str(error)) from None


@dataclass(frozen=True, slots=True)
class TrainingPicture(PictureFile):
    """A picture to train on, with its captions, image prompts and mask."""

    captions: tuple[str, ...]  # at least one
    image_prompts: tuple[PictureFile, ...] = ()
    set: int = -1  # index of its set in data.sets; -1: none
    mask: PictureFile | None = None  # the picture itself if its transparency is the mask


class Companions(NamedTuple):
    """The files beside a set's pictures: where to find masks and captions."""

    masks: str = "none"  # or beside, alpha
    mask_folder: Path | None = None
    caption: str | None = None  # for pictures without one
    caption_suffix: str | None = None  # the only kind of caption files to read

    @property
    def own(self) -> tuple[str, ...]:
        """The captions of a picture without captions of its own: one or none."""
        return () if self.caption is None else (self.caption,)


NONE_BESIDE = Companions()


def mask_of(stem: str) -> str | None:
    """The name of the picture whose mask this file would be by its name, both without extension; else None."""
    return next((stem[: -len(mark)] for mark in MASKS if stem.endswith(mark)), None)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A picture that is left out, and the reason."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{printable(self.name)} ({self.reason})"


Listing = Iterator[TrainingPicture | Skipped]


def kind_not_read(suffix: str) -> str:
    """Why a picture of a kind NOT_READ is left out."""
    return f"pictures of kind {suffix} are not read; save it as PNG or JPEG"


def picture_size(data: bytes) -> tuple[int, int]:
    """(height, width) of the upright picture, from the file's first bytes. Raises PictureError."""
    with open_picture(data) as picture:
        width, height = picture.size
        orientation = _orientation(picture)
        if isinstance(picture, TiffImageFile):  # picture.size is upright only in newer versions of Pillow
            width, height = picture.tag_v2[256], picture.tag_v2[257]
        return (width, height) if orientation in LYING else (height, width)


class Crop(NamedTuple):
    """A part of a picture in the bucket's aspect ratio: its position, as shares of the free room, and its size."""

    x: float = 0.5
    y: float = 0.5
    zoom: float = 1.0  # how many times longer the sides of the largest possible part are


CENTRE = Crop()


def read_picture(data: bytes, bucket: Bucket, size: tuple[int, int], crop: Crop = CENTRE) -> Tensor:
    """A part of the bucket's aspect ratio, by default the largest around the centre, resized: uint8 (3, *size).

    size: (height, width), such as the compressor's for the bucket. Resized once, from the file's own pixels, with
    antialiasing.
    """
    with open_picture(data) as picture:
        if isinstance(picture, TiffImageFile):
            picture.load()  # turns it upright and removes its tag
        orientation = _orientation(picture)
        shape, (height, width) = bucket, size
        if orientation in LYING:
            shape, (height, width) = Bucket(bucket.width, bucket.height), (width, height)
        # A JPEG can be decoded at half the size or less in a fraction of the time; keeps at least twice the needed
        # size.
        picture.draft(None, (math.ceil(2 * width * crop.zoom), math.ceil(2 * height * crop.zoom)))
        box = _box(picture.size, shape, _as_stored(crop, orientation))
        resized = _as_rgb(picture).resize((width, height), Image.Resampling.BICUBIC, box, reducing_gap=3.0)
        if orientation in UPRIGHT:
            resized = resized.transpose(UPRIGHT[orientation])
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def read_mask(
    data: bytes, bucket: Bucket, size: tuple[int, int], crop: Crop, transparency: bool, aspect: float
) -> Tensor:
    """The same part of a mask: uint8 of `size`, white where the picture counts; a cell is the mean of its pixels.

    transparency: use the picture's own transparency, white where opaque. aspect: width / height of the picture, which
    the mask must share. Raises PictureError.
    """
    with open_picture(data) as picture:
        if isinstance(picture, TiffImageFile):
            picture.load()
        orientation = _orientation(picture)
        mask = _opacity(picture) if transparency else _as_rgb(picture).convert("L")
        if orientation in UPRIGHT:
            mask = mask.transpose(UPRIGHT[orientation])
        if abs(math.log(mask.width / mask.height / aspect)) > SAME_ASPECT:
            raise PictureError("its mask has other proportions than the picture")
        height, width = size
        box = _box(mask.size, bucket, crop)
        return torch.from_numpy(np.array(mask.resize((width, height), Image.Resampling.BOX, box)))


def _opacity(picture: Image.Image) -> Image.Image:
    picture = as_8_bit(picture)
    if "A" in picture.getbands() or "transparency" in picture.info:
        return picture.convert("RGBA").getchannel("A")
    return Image.new("L", picture.size, 255)


def read_whole(data: bytes, side: int) -> Tensor:
    """All of a picture, upright: uint8 (3, H, W). side: a JPEG is decoded at no less than twice this."""
    with open_picture(data) as picture:
        if isinstance(picture, TiffImageFile):
            picture.load()  # turns it upright and removes its tag
        orientation = _orientation(picture)
        picture.draft(None, (2 * side, 2 * side))
        whole = _as_rgb(picture)
        if orientation in UPRIGHT:
            whole = whole.transpose(UPRIGHT[orientation])
        return torch.from_numpy(np.array(whole)).permute(2, 0, 1)


def _box(size: tuple[int, int], shape: Bucket, crop: Crop) -> tuple[float, float, float, float]:
    """The box (left, top, right, bottom) within (width, height) that has the bucket's aspect ratio."""
    width, height = size
    scale = min(height / shape.height, width / shape.width) / crop.zoom
    h, w = shape.height * scale, shape.width * scale
    left, top = (width - w) * crop.x, (height - h) * crop.y
    return max(left, 0.0), max(top, 0.0), min(left + w, width), min(top + h, height)


def _as_stored(crop: Crop, orientation: int) -> Crop:
    """A crop of the upright picture, converted to the pixels as stored."""
    x, y, zoom = crop
    stored = {
        2: (1 - x, y), 3: (1 - x, 1 - y), 4: (x, 1 - y), 5: (y, x), 6: (y, 1 - x), 7: (1 - y, 1 - x), 8: (1 - y, x),
    }.get(orientation, (x, y))  # fmt: skip
    return Crop(*stored, zoom)


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none. Not read from PNG, which Pillow would have to decode."""
    if picture.format == "PNG" and "exif" not in picture.info:
        return 1
    return picture.getexif().get(ORIENTATION, 1)


def _as_rgb(picture: Image.Image) -> Image.Image:
    """8-bit RGB, on white where transparent; 16-bit greyscale is scaled, where Pillow would clip it."""
    picture = as_8_bit(picture)
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")
