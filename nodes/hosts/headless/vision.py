"""CLIP_VISION without ComfyUI: the core's image encoder."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ....cascade_core.errors import CascadeError
from ....cascade_core.networks import activations
from .clip import encoder_dtype
from .device import on_device
from .weights import naming_non_finite

if TYPE_CHECKING:
    from ....cascade_core.vision import ImageEncoder


@dataclass(frozen=True)
class HeadlessVision:
    """An image encoder."""

    encoder: "ImageEncoder"
    file: str

    def networks(self) -> list[tuple[nn.Module, str]]:
        """The network with the name of its file."""
        return [(self.encoder.model, self.file)]


@dataclass(frozen=True)
class HeadlessVisionOutput:
    """CLIP_VISION_OUTPUT.  image_embeds: (B, E) float32"""

    image_embeds: Tensor


def load_vision(path: Path) -> HeadlessVision:
    from ....cascade_core.vision import ImageEncoder  # transformers takes seconds to import

    return HeadlessVision(ImageEncoder.load(path, dtype=encoder_dtype()), path.name)


@torch.inference_mode()
def encode_image(vision: HeadlessVision, image: Tensor) -> HeadlessVisionOutput:
    if not isinstance(vision, HeadlessVision):
        raise CascadeError(
            f"The CLIP_VISION is a {type(vision).__name__}; connect Load Cascade Image Encoder."
        )
    from ....cascade_core.vision import IMAGES_AT_ONCE

    model, batch = vision.encoder.model, min(len(image), IMAGES_AT_ONCE)
    positions = (model.config.image_size // model.config.patch_size) ** 2 + 1
    working = activations.clip_encoder(model.config, batch, positions) * model.dtype.itemsize
    working += 8 * image[:batch].numel()  # the pictures, in float32, and one more while they are resized
    with naming_non_finite(vision):
        embeds = on_device(model, lambda _: vision.encoder.encode(image).cpu(), working, once=True)
    return HeadlessVisionOutput(embeds)
