"""CLIP_VISION without ComfyUI: the core's image encoder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ....cascade_core.errors import CascadeError
from ....cascade_core.stages.prompt import VisionStage, load_image_encoder
from .device import compute_device
from .values import words_for


@dataclass(frozen=True)
class HeadlessVisionOutput:
    """CLIP_VISION_OUTPUT.  image_embeds: (B, E) float32"""

    image_embeds: Tensor


def load_vision(path: Path) -> VisionStage:
    return load_image_encoder(path, compute_device())


def encode_image(vision: Any, image: Tensor) -> HeadlessVisionOutput:
    if not isinstance(vision, VisionStage):
        raise CascadeError(f"The CLIP_VISION is {words_for(vision)}; connect Load Cascade Image Encoder.")
    return HeadlessVisionOutput(vision.encode(image))
