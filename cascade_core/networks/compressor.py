"""Semantic compressor: an image becomes Stage C's latent, 32 times smaller each way."""

import torch
from torch import Tensor, nn

from ..errors import CascadeError
from .config import CompressorConfig
from .efficientnet import BatchNorm2d, EfficientNetV2

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class SemanticCompressor(nn.Module):
    """EfficientNetV2 and a 1×1 mapper to a latent of mean 0 and variance 1 in every channel."""

    def __init__(self, config: CompressorConfig, operations=nn):
        super().__init__()
        self.config = config
        self.backbone = EfficientNetV2(
            3, config.stem, config.stages, config.c_last, drop_path=config.drop_path, operations=operations
        )
        self.mapper = nn.Sequential(
            operations.Conv2d(config.c_last, config.c_latent, kernel_size=1, bias=False),
            BatchNorm2d(config.c_latent, affine=False),
        )

    @classmethod
    def from_config(cls, config: dict, operations=nn) -> "SemanticCompressor":
        """Builds it from `{"c_latent": 16}`, the published compressor, or with the arguments of another size."""
        return cls(CompressorConfig.from_dict(config), operations)

    def forward(self, image: Tensor) -> Tensor:
        """image: (B, 3, H, W) in [0, 1] -> latent (B, c_latent, H / 32, W / 32)"""
        return self.mapper(self.backbone(normalise(image)))


def normalise(image: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> the same shape, each channel by ImageNet's mean and standard deviation."""
    if image.ndim != 4 or image.shape[1] != 3:
        raise CascadeError(
            f"The semantic compressor got an image of shape {tuple(image.shape)}, expected (B, 3, H, W): "
            "RGB, channels first; drop an alpha channel before it."
        )
    # Scalars instead of buffers, since the published file has no such keys, and a buffer missing there would stay on
    # meta.
    channels = zip(image.unbind(1), IMAGENET_MEAN, IMAGENET_STD, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)
