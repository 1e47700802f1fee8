"""Pictures as bytes in files -> pixels of a bucket: upright, cropped to its centre, RGB."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
NOT_READ = (  # pictures that are left out with a word, where other files are not of interest
    ".arw", ".cr2", ".cr3", ".dng", ".eps", ".exr", ".gif", ".hdr", ".heic", ".heif", ".hif", ".ico", ".jfif", ".jp2",
    ".jpe", ".jxl", ".kra", ".nef", ".orf", ".pbm", ".pgm", ".ppm", ".psb", ".psd", ".qoi", ".raf", ".raw", ".rw2",
    ".svg", ".tga", ".xcf",
)  # fmt: skip
IMAGE_PROMPT = re.compile(
    r"(.*)\.prompt(\d{1,4})", re.DOTALL
)  # 0001.prompt0, without its ending, prompts for 0001
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


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A picture's bytes within a file."""

    name: str  # for people: its path within the folder, or the tar's and its own
    path: Path  # the file that holds it
    offset: int  # bytes
    length: int
    stamp: int  # when the file was last changed, in nanoseconds

    @property
    def identity(self) -> str:
        """A text that changes where the picture may have changed."""
        return f"{self.path}\n{self.offset}\n{self.length}\n{self.stamp}"

    def read(self, at_most: int | None = None) -> bytes:
        """Its bytes, or the first of them. Raises PictureError."""
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
    """A picture to train on, and what prompts for it."""

    captions: tuple[str, ...]  # at least one
    image_prompts: tuple[PictureFile, ...] = ()
    set: int = -1  # which of data.sets it is of


@dataclass(frozen=True, slots=True)
class Skipped:
    """A picture that is left out, and why."""

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
        if isinstance(picture, TiffImageFile):  # picture.size is upright in newer versions of Pillow alone
            width, height = picture.tag_v2[256], picture.tag_v2[257]
        return (width, height) if orientation in LYING else (height, width)


def read_picture(data: bytes, bucket: Bucket, size: tuple[int, int]) -> Tensor:
    """The largest part of the bucket's aspect ratio around the centre, resized: uint8 (3, *size).

    size: (height, width), such as what the compressor reads for the bucket. Resized once, from the file's own pixels,
    with antialiasing.
    """
    with open_picture(data) as picture:
        if isinstance(picture, TiffImageFile):
            picture.load()  # which turns it upright, and then its tag is gone
        orientation = _orientation(picture)
        shape, (height, width) = bucket, size
        if orientation in LYING:
            shape, (height, width) = Bucket(bucket.width, bucket.height), (width, height)
        # JPEG can be decoded at half or less the size in a fraction of the time; twice what is needed is kept.
        picture.draft(None, (2 * width, 2 * height))
        box = _centre(picture.size, shape)
        resized = _as_rgb(picture).resize((width, height), Image.Resampling.BICUBIC, box, reducing_gap=3.0)
        if orientation in UPRIGHT:
            resized = resized.transpose(UPRIGHT[orientation])
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def read_whole(data: bytes, side: int) -> Tensor:
    """All of a picture, upright: uint8 (3, H, W). side: a JPEG is decoded at no less than twice this."""
    with open_picture(data) as picture:
        if isinstance(picture, TiffImageFile):
            picture.load()  # which turns it upright, and then its tag is gone
        orientation = _orientation(picture)
        picture.draft(None, (2 * side, 2 * side))
        whole = _as_rgb(picture)
        if orientation in UPRIGHT:
            whole = whole.transpose(UPRIGHT[orientation])
        return torch.from_numpy(np.array(whole)).permute(2, 0, 1)


def _centre(size: tuple[int, int], shape: Bucket) -> tuple[float, float, float, float]:
    """The box (left, top, right, bottom) within (width, height) that has the bucket's aspect ratio."""
    width, height = size
    scale = min(height / shape.height, width / shape.width)
    h, w = shape.height * scale, shape.width * scale
    left, top = (width - w) / 2, (height - h) / 2
    return max(left, 0.0), max(top, 0.0), min(left + w, width), min(top + h, height)


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none. A PNG's would be sought by decoding all of it."""
    if picture.format == "PNG" and "exif" not in picture.info:
        return 1
    return picture.getexif().get(ORIENTATION, 1)


def _as_rgb(picture: Image.Image) -> Image.Image:
    """8-bit RGB; 16-bit greyscale scaled, which Pillow would clip, and what is transparent laid on white."""
    picture = as_8_bit(picture)
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")
