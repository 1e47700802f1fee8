"""CLIP_VISION without ComfyUI: the core's image encoder."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ....cascade_core.errors import CascadeError
from .clip import encoder_dtype
from .device import on_device

if TYPE_CHECKING:
    from ....cascade_core.vision import ImageEncoder


@dataclass(frozen=True)
class HeadlessVision:
    """An image encoder."""

    encoder: "ImageEncoder"


@dataclass(frozen=True)
class HeadlessVisionOutput:
    """CLIP_VISION_OUTPUT.  image_embeds: (B, E) float32"""

    image_embeds: Tensor


def load_vision(path: Path) -> HeadlessVision:
    from ....cascade_core.vision import ImageEncoder  # transformers takes seconds to import

    return HeadlessVision(ImageEncoder.load(path, dtype=encoder_dtype()))


@torch.inference_mode()
def encode_image(vision: HeadlessVision, image: Tensor) -> HeadlessVisionOutput:
    if not isinstance(vision, HeadlessVision):
        raise CascadeError(
            f"The CLIP_VISION is a {type(vision).__name__}; connect Load Cascade Image Encoder."
        )
    with on_device(vision.encoder.model):
        return HeadlessVisionOutput(vision.encoder.encode(image).cpu())
