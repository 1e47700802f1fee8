"""Pictures as files and as tensors: IMAGE (B, H, W, 3) and MASK (B, H, W), float32 in [0, 1], sRGB."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..cascade_core.errors import CascadeError

_NO_MASK = (64, 64)  # ComfyUI's size for the mask of a picture without transparency


def open_frames(path: Path) -> list[Image.Image]:
    """Reads the frames of a picture, turned upright by its EXIF; only those of the first one's size.

    Raises CascadeError for an unreadable, truncated or implausibly large file, or one that is not a picture.
    """
    try:
        with Image.open(path) as picture:
            stored = [frame.copy() for frame in ImageSequence.Iterator(picture)]
            frames = [_as_8_bit(ImageOps.exif_transpose(frame)) for frame in stored]
            single = picture.format == "MPO"  # a photograph with smaller versions of itself
    except UnidentifiedImageError as error:
        raise CascadeError(f"{path} is not a picture; PNG, JPEG or WebP was expected.") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise CascadeError(f"The picture {path} cannot be read: {error}.") from error
    if single:
        return frames[:1]
    return [frame for frame in frames if frame.size == frames[0].size]


def _as_8_bit(frame: Image.Image) -> Image.Image:
    """Scales 16-bit greyscale to 8-bit, which Pillow would clip."""
    if frame.mode.startswith("I"):
        return Image.fromarray((np.asarray(frame, dtype=np.int64) // 257).clip(0, 255).astype(np.uint8))
    return frame


def _has_alpha(frame: Image.Image) -> bool:
    return "A" in frame.getbands() or "transparency" in frame.info


def channel(frame: Image.Image, index: int) -> Tensor:
    """Channel R, G, B or A of a frame: (H, W) in [0, 1]."""
    values = np.asarray(frame.convert("RGBA"), dtype=np.float32)[..., index] / 255.0
    return torch.from_numpy(values)


def read_image(path: Path) -> tuple[Tensor, Tensor]:
    """IMAGE (B, H, W, 3) and MASK of a picture, one for each frame; the mask is 1 where it is transparent."""
    frames = open_frames(path)
    images, masks = [], []
    for frame in frames:
        images.append(torch.from_numpy(np.asarray(frame.convert("RGB"), dtype=np.float32) / 255.0))
        masks.append(1.0 - channel(frame, 3) if _has_alpha(frame) else torch.zeros(_NO_MASK))
    return torch.stack(images), torch.stack(masks)


def read_mask(path: Path, name: str) -> Tensor:
    """MASK (1, H, W) from one channel of a picture's first frame; alpha is inverted, as in ComfyUI."""
    values = channel(open_frames(path)[0], ("red", "green", "blue", "alpha").index(name))
    return (1.0 - values if name == "alpha" else values)[None]


def encode_png(image: Tensor, texts: Mapping[str, Any], compress_level: int = 4) -> bytes:
    """Encodes one image (H, W, C), C = 1, 3 or 4, clipped to [0, 1], as PNG; `texts` as JSON in text chunks."""
    values = (255.0 * image.detach().float().cpu().numpy()).clip(0, 255).astype(np.uint8)
    picture = Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values)
    chunks = PngInfo()
    for name, value in texts.items():
        chunks.add_text(name, json.dumps(value))
    stream = io.BytesIO()
    picture.save(stream, format="PNG", pnginfo=chunks, compress_level=compress_level)
    return stream.getvalue()
