"""EfficientNetV2 feature extractor (Tan & Le 2021, arXiv:2104.00298) at any table of stages.

The state-dict keys are those of torchvision's `efficientnet_v2_s().features`, so that the published
compressor and ControlNets load without renaming: `0` is the stem, `1` to `n` are the stages, `n + 1` is the
last 1×1 convolution.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import PUBLISHED_LAST, PUBLISHED_STAGES, PUBLISHED_STEM, EfficientNetStage

BATCH_NORM_EPS = 1e-3  # torchvision's for the V2 family; torch's own default is 1e-5


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that in eval mode follows its input's device and precision.

    Hosts inject convolutions that do so, but only their newest versions have such a BatchNorm2d.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            return super().forward(input)
        statistics = (self.running_mean, self.running_var, self.weight, self.bias)
        mean, var, weight, bias = (_follow(value, input) for value in statistics)
        return F.batch_norm(input, mean, var, weight, bias, False, 0.0, self.eps)


def _follow(value: Tensor | None, x: Tensor) -> Tensor | None:
    # float32 statistics beside a half-precision input stay float32: torch computes that mixture natively
    return None if value is None else value.to(x.device, torch.promote_types(value.dtype, x.dtype))


class ConvNorm(nn.Sequential):
    """Convolution without bias, batch normalisation and, unless `activate` is False, SiLU."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        padding: int | None = None,
        activate: bool = True,
        operations=nn,
    ):
        padding = kernel // 2 if padding is None else padding
        conv = operations.Conv2d(
            c_in, c_out, kernel, stride=stride, padding=padding, groups=groups, bias=False
        )
        activation = [nn.SiLU(inplace=True)] if activate else []
        super().__init__(conv, BatchNorm2d(c_out, eps=BATCH_NORM_EPS), *activation)


class SqueezeExcitation(nn.Module):
    """Scales every channel by a gate computed from all channels' means (Hu et al. 2017, arXiv:1709.01507)."""

    def __init__(self, channels: int, squeezed: int, operations=nn):
        super().__init__()
        self.fc1 = operations.Conv2d(channels, squeezed, 1)
        self.fc2 = operations.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
        return x * torch.sigmoid(self.fc2(F.silu(self.fc1(gate))))


class MBConvBlock(nn.Module):
    """Inverted bottleneck, fused or depthwise.  x: (B, c_in, H, W) -> (B, c_out, H / stride, W / stride)"""

    def __init__(self, stage: EfficientNetStage, c_in: int, stride: int, drop_path: float, operations=nn):
        super().__init__()
        build = _fused_layers if stage.kind == "fused" else _mbconv_layers
        self.block = nn.Sequential(*build(stage, c_in, stride, operations))
        self.residual = stride == 1 and c_in == stage.c_out
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        h = self.block(x)
        if not self.residual:
            return h
        if self.training and self.drop_path > 0:
            h = stochastic_depth(h, self.drop_path)
        return x + h


def _fused_layers(stage: EfficientNetStage, c_in: int, stride: int, operations) -> list[nn.Module]:
    if stage.expand == 1:
        return [ConvNorm(c_in, stage.c_out, stage.kernel, stride, operations=operations)]
    hidden = c_in * stage.expand
    return [
        ConvNorm(c_in, hidden, stage.kernel, stride, operations=operations),
        ConvNorm(hidden, stage.c_out, activate=False, operations=operations),
    ]


def _mbconv_layers(stage: EfficientNetStage, c_in: int, stride: int, operations) -> list[nn.Module]:
    hidden = c_in * stage.expand
    expand = [] if stage.expand == 1 else [ConvNorm(c_in, hidden, operations=operations)]
    return [
        *expand,
        ConvNorm(hidden, hidden, stage.kernel, stride, groups=hidden, operations=operations),
        SqueezeExcitation(hidden, max(1, c_in // 4), operations),
        ConvNorm(hidden, stage.c_out, activate=False, operations=operations),
    ]


def stochastic_depth(h: Tensor, probability: float) -> Tensor:
    """Drops an image's whole branch with `probability`, keeping the mean (Huang 2016, arXiv:1603.09382)."""
    keep = 1.0 - probability
    mask = torch.empty(h.shape[0], 1, 1, 1, device=h.device, dtype=h.dtype).bernoulli_(keep)
    return h * mask / keep


class EfficientNetV2(nn.Sequential):
    """Features of an image.  x: (B, c_in, H, W) -> (B, c_last, H / s, W / s), s = 2 × the stages' strides.

    `stem_padding` is 0 in the published ControlNets whose hint does not have three channels. `drop_path` is the
    stochastic depth in training, rising linearly from 0 at the first block.
    """

    def __init__(
        self,
        c_in: int = 3,
        stem: int = PUBLISHED_STEM,
        stages: Sequence[EfficientNetStage] = PUBLISHED_STAGES,
        c_last: int = PUBLISHED_LAST,
        stem_padding: int = 1,
        drop_path: float = 0.0,
        operations=nn,
    ):
        total = sum(stage.layers for stage in stages)
        features: list[nn.Module] = [ConvNorm(c_in, stem, 3, 2, padding=stem_padding, operations=operations)]
        channels, done = stem, 0
        for stage in stages:
            blocks = []
            for layer in range(stage.layers):
                stride = stage.stride if layer == 0 else 1
                blocks.append(MBConvBlock(stage, channels, stride, drop_path * done / total, operations))
                channels, done = stage.c_out, done + 1
            features.append(nn.Sequential(*blocks))
        features.append(ConvNorm(channels, c_last, operations=operations))
        super().__init__(*features)
