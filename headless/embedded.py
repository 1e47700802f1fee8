"""Texts inside pictures: the graph that made one, and other programs' descriptions of how it was made.

PNG has them in text chunks; JPEG, WebP and AVIF in the EXIF, where ComfyUI writes `prompt:{…}` and `workflow:{…}`
into the tags Model, Make and those before. The size of the file bounds what is read, and Pillow bounds compressed
chunks.
"""

from __future__ import annotations

from pathlib import Path

from PIL.PngImagePlugin import PngImageFile

from ..cascade_core.pictures import open_picture

SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF")  # of PNG, JPEG and WebP
_AVIF = b"ftypavif"
KEYS = ("prompt", "workflow", "parameters")


def is_picture(start: bytes) -> bool:
    """Whether a file with these first bytes is a picture that may hold a graph."""
    return start.startswith(SIGNATURES) or start[4:12] == _AVIF


def embedded_texts(path: Path) -> tuple[dict[str, str], tuple[int, int]]:
    """(existing texts of "prompt", "workflow" and "parameters"; (width, height)). Raises PictureError."""
    with open_picture(path) as picture:
        texts = _texts(picture.info)
        if isinstance(picture, PngImageFile):
            if not texts:  # there may be chunks after the pixels, which have to be decoded to reach them
                texts = _texts(picture.text)
        else:
            values = [value for value in picture.getexif().values() if isinstance(value, str)]
            pairs = [value.partition(":") for value in values]
            texts |= {key.lower(): text.rstrip("\x00") for key, _, text in pairs if key.lower() in KEYS}
        return texts, picture.size


def _texts(info: dict) -> dict[str, str]:
    return {key: str(info[key]) for key in KEYS if isinstance(info.get(key), str)}
