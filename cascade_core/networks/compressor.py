"""Semantic compressor: an image becomes Stage C's latent, 32 times smaller each way."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CascadeError
from .config import Config
from .efficientnet import (
    PUBLISHED_LAST,
    PUBLISHED_STAGES,
    PUBLISHED_STEM,
    BatchNorm2d,
    EfficientNetV2,
    Stage,
    infer_efficientnet,
    stage_table,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class CompressorConfig(Config):
    """The semantic compressor; `c_latent` is the published constructor's one argument.

    The others give another size: `stages` holds rows `(kind, expand, kernel, stride, c_out, layers)` as
    `efficientnet.Stage`; `drop_path` is the stochastic depth that the last blocks approach in training.
    """

    c_latent: int = 16
    stem: int = PUBLISHED_STEM
    stages: tuple[Stage, ...] = PUBLISHED_STAGES
    c_last: int = PUBLISHED_LAST
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", stage_table(self.stages))


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
        """Built from `{"c_latent": 16}`, the published compressor, or with the arguments of another size."""
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
    # Scalars, not buffers: the published file has no such keys, and a buffer it lacks would stay on meta.
    channels = zip(image.unbind(1), IMAGENET_MEAN, IMAGENET_STD, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)


def infer_compressor(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """Config of the compressor whose state dict has these keys and shapes, or None where it is no compressor.

    The published backbone is left out, so that its file gives `{"c_latent": 16}`; another is given whole.
    """
    mapper = shapes.get("mapper.0.weight")
    if mapper is None or len(mapper) != 4 or "mapper.1.running_mean" not in shapes:
        return None
    backbone = infer_efficientnet(shapes, "backbone.")
    if backbone is None or backbone.pop("c_in") != 3 or mapper[1] != backbone["c_last"]:
        return None
    return {"c_latent": mapper[0], **unpublished(backbone)}


def unpublished(backbone: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments `stem stages c_last` of an EfficientNetV2; none where it is the published one."""
    published = {
        "stem": PUBLISHED_STEM,
        "stages": [list(stage) for stage in PUBLISHED_STAGES],
        "c_last": PUBLISHED_LAST,
    }
    return {} if backbone == published else dict(backbone)
