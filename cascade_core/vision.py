"""CLIP's image encoder: pictures -> the embedding that Stage C takes as an image prompt."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import CascadeError
from .text.clip import CONFIG_KEYS, explain_non_finite, infer_vision_config, load_clip

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection

__all__ = ["ImageEncoder", "build_vision_model", "infer_vision_config", "preprocess_images"]

logger = logging.getLogger(__name__)

# Mean and deviation of CLIP's training pictures (Radford et al. 2021), in sRGB.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGES_AT_ONCE = 16


def build_vision_model(
    config: Mapping[str, Any], device: str | torch.device | None = None
) -> CLIPVisionModelWithProjection:
    """transformers' CLIP image encoder with its projection, freshly initialised; without values on "meta".

    config: `hidden_size`, `intermediate_size`, `num_hidden_layers`, `num_attention_heads`, `projection_dim`,
    `image_size`, `patch_size`, and optionally `num_channels` (3), `hidden_act` ("quick_gelu"),
    `layer_norm_eps`. Other keys are ignored.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    stated = {key: config[key] for key in CONFIG_KEYS["vision"] if key in config}
    with torch.device(device or torch.get_default_device()):
        return CLIPVisionModelWithProjection(CLIPVisionConfig(**{"attn_implementation": "sdpa", **stated}))


def preprocess_images(images: Tensor, size: int) -> Tensor:
    """(B, H, W, 3) sRGB in [0, 1] -> (B, 3, size, size) in CLIP's units; the middle square, resized.

    Rounded to 8 bits as in ComfyUI; the published code, through torchvision, does not round.
    """
    x = middle_square(images, size).movedim(-1, 1)  # (B, 3, size, size)
    x = (255 * x).clamp(0, 255).round() / 255
    mean, std = (x.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (x - mean) / std


def middle_square(images: Tensor, size: int) -> Tensor:
    """(B, H, W, 3) in [0, 1] -> (B, size, size, 3): the middle, after the shorter side is resized to `size`.

    Bicubic and antialiased. The longer side is cut down to whole pixels, as in transformers and the published code
    (ComfyUI rounds it): 400 × 300 becomes 298 × 224. A fourth channel is dropped.
    """
    x = images[..., :3].float()
    height, width = x.shape[1:3]
    if (height, width) == (size, size):
        return x
    shorter = min(height, width)
    resized = (size * height // shorter, size * width // shorter)
    x = F.interpolate(x.movedim(-1, 1), resized, mode="bicubic", antialias=True).movedim(1, -1)
    top, left = (x.shape[1] - size) // 2, (x.shape[2] - size) // 2
    return x[:, top : top + size, left : left + size]


class ImageEncoder:
    """Pictures -> CLIP embeddings."""

    def __init__(self, model: CLIPVisionModelWithProjection):
        self.model = model
        self.image_size = cast(int, model.config.image_size)

    @classmethod
    def load(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = None,
        notify: Callable[[str], object] = logger.warning,
        placed: bool = False,
    ) -> ImageEncoder:
        """Loads a safetensors file or a model folder for inference, in the file's dtype unless one is given.

        placed: placement reads and casts it later, on its way to a device.
        """
        return cls(load_clip(path, "vision", build_vision_model, dtype, notify, placed))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) sRGB in [0, 1], of any size -> (B, E) float32, projected, on the model's device."""
        if images.ndim != 4 or images.shape[-1] < 3:
            raise CascadeError(f"Images of shape {tuple(images.shape)} were given; expected (B, H, W, 3).")
        parts = images.split(IMAGES_AT_ONCE)
        device, size = self.model.device, self.image_size
        return torch.cat([self.encode_pixels(preprocess_images(part.to(device), size)) for part in parts])

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """As `encode`, for the result of `preprocess_images`, (B, 3, size, size)."""
        model = self.model
        result = model(pixel_values=pixels.to(model.device, model.dtype)).image_embeds.float()
        explain_non_finite(model, result, "image encoder")
        return result
