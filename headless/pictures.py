"""Pictures as files and as tensors: IMAGE (B, H, W, 3) and MASK (B, H, W), float32 in [0, 1], sRGB."""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..cascade_core.pictures import open_picture, read_frames, upright
from .graph import to_json

_NO_MASK = (64, 64)  # ComfyUI's size for the mask of a picture without transparency
COMPRESS_LEVEL = 4  # of a PNG, as in ComfyUI


def _has_alpha(frame: Image.Image) -> bool:
    return "A" in frame.getbands() or "transparency" in frame.info


def channel(frame: Image.Image, index: int) -> Tensor:
    """Channel R, G, B or A of a frame: (H, W) in [0, 1]."""
    return _values(frame.convert("RGBA").getchannel(index))


def _values(picture: Image.Image) -> Tensor:
    """A picture's bytes in [0, 1], divided in place: a large picture takes gigabytes."""
    values = np.array(picture, dtype=np.float32)
    values /= 255.0
    return torch.from_numpy(values)


def read_image(path: Path) -> tuple[Tensor, Tensor]:
    """IMAGE (B, H, W, 3) and MASK of a picture, one for each frame; the mask is 1 where it is transparent."""
    frames = read_frames(path)
    images = [_values(frame.convert("RGB")) for frame in frames]
    if not any(map(_has_alpha, frames)):
        return _batch(images), torch.zeros(len(frames), *_NO_MASK)
    return _batch(images), _batch([1.0 - channel(frame, 3) for frame in frames])


def _batch(tensors: list[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)  # avoids a copy of a single frame


def read_mask(path: Path, name: str) -> Tensor:
    """MASK (1, H, W) from one channel of a picture's first frame; alpha is inverted, as in ComfyUI."""
    with open_picture(path) as picture:
        values = channel(upright(picture), ("red", "green", "blue", "alpha").index(name))
    return (1.0 - values if name == "alpha" else values)[None]


def encode_png(image: Tensor, texts: Mapping[str, Any], parameters: str | None = None) -> bytes:
    """Encodes one image (H, W, C), C = 1, 3 or 4, clipped to [0, 1], as PNG.

    texts: written as JSON into text chunks; parameters: a text, written unchanged into the chunk of that name

    The filtered rows of a photograph have few repeated strings, so zlib's run-length strategy takes half the time for
    a file of the same size. Drawings become a fifth larger.
    """
    values = (255.0 * image.detach().float()).clamp_(0, 255).to(torch.uint8).cpu().numpy()
    picture = Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values)
    chunks = PngInfo()
    for name, value in texts.items():
        chunks.add_text(name, to_json(value))
    if parameters is not None:
        chunks.add_text("parameters", parameters)
    stream = io.BytesIO()
    picture.save(
        stream, format="PNG", pnginfo=chunks, compress_level=COMPRESS_LEVEL, compress_type=zlib.Z_RLE
    )
    return stream.getvalue()
