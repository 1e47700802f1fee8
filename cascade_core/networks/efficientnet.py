"""EfficientNetV2 feature extractor (Tan & Le 2021, arXiv:2104.00298) at any table of stages.

The state-dict keys are those of torchvision's `efficientnet_v2_s().features`, so that the published
compressor and ControlNets load without renaming: `0` is the stem, `1` to `n` are the stages, `n + 1` is the
last 1×1 convolution.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CascadeError

BATCH_NORM_EPS = 1e-3  # torchvision's for the V2 family; torch's own default is 1e-5


class Stage(NamedTuple):
    """One row of the table: `layers` blocks of a kind; the first has the stride and changes the width."""

    kind: str  # "fused" (Fused-MBConv) or "mbconv"
    expand: int
    kernel: int
    stride: int
    c_out: int
    layers: int


PUBLISHED_STEM = 24
PUBLISHED_STAGES = (
    Stage("fused", 1, 3, 1, 24, 2),
    Stage("fused", 4, 3, 2, 48, 4),
    Stage("fused", 4, 3, 2, 64, 4),
    Stage("mbconv", 4, 3, 2, 128, 6),
    Stage("mbconv", 6, 3, 1, 160, 9),
    Stage("mbconv", 6, 3, 2, 256, 15),
)
PUBLISHED_LAST = 1280


def stage_table(rows: Sequence[Sequence[Any]]) -> tuple[Stage, ...]:
    """Rows `(kind, expand, kernel, stride, c_out, layers)`, or five values where the kernel is 3, as stages.

    Raises CascadeError for a row that describes no stage.
    """
    return tuple(_stage(number, row) for number, row in enumerate(rows, start=1))


def _stage(number: int, row: Sequence[Any]) -> Stage:
    full = [*row[:2], 3, *row[2:]] if len(row) == 5 else list(row)
    sizes_ok = len(full) == 6 and all(isinstance(size, int) and size > 0 for size in full[1:])
    if not sizes_ok or full[0] not in ("fused", "mbconv"):
        raise CascadeError(
            f"EfficientNet stage {number} is {list(row)!r}, expected [kind, expand, kernel, stride, c_out, "
            'layers] with kind "fused" or "mbconv" and positive integers (the kernel may be left out); '
            "correct the config."
        )
    return Stage(*full)


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that in eval mode follows its input's device and precision.

    Hosts inject convolutions that do so but have no BatchNorm2d of that kind, or only lately.
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

    def __init__(self, stage: Stage, c_in: int, stride: int, drop_path: float, operations=nn):
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


def _fused_layers(stage: Stage, c_in: int, stride: int, operations) -> list[nn.Module]:
    if stage.expand == 1:
        return [ConvNorm(c_in, stage.c_out, stage.kernel, stride, operations=operations)]
    hidden = c_in * stage.expand
    return [
        ConvNorm(c_in, hidden, stage.kernel, stride, operations=operations),
        ConvNorm(hidden, stage.c_out, activate=False, operations=operations),
    ]


def _mbconv_layers(stage: Stage, c_in: int, stride: int, operations) -> list[nn.Module]:
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

    `stem_padding` 0 is what the published ControlNets have where their hint has not three channels.
    `drop_path` is the stochastic depth in training, rising linearly from 0 at the first block.
    """

    def __init__(
        self,
        c_in: int = 3,
        stem: int = PUBLISHED_STEM,
        stages: Sequence[Stage] = PUBLISHED_STAGES,
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


def infer_efficientnet(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, Any] | None:
    """Constructor arguments `c_in stem stages c_last` of the network whose keys start with `prefix`, or None.

    Strides leave no trace in shapes: see `published_strides`.
    """
    stem = _conv_shape(shapes, f"{prefix}0.0.weight")
    if stem is None:
        return None
    channels, number, rows = stem[0], 1, []
    while f"{prefix}{number}.0.block.0.0.weight" in shapes:
        row = _infer_stage(shapes, f"{prefix}{number}.", channels)
        if row is None:
            return None
        rows.append(row)
        channels, number = row.c_out, number + 1
    last = _conv_shape(shapes, f"{prefix}{number}.0.weight")
    if not rows or last is None or last[1] != channels:
        return None
    strided = zip(rows, published_strides(len(rows)), strict=True)
    stages = [list(row._replace(stride=stride)) for row, stride in strided]
    return {"c_in": stem[1], "stem": stem[0], "stages": stages, "c_last": last[0]}


def published_strides(count: int) -> tuple[int, ...]:
    """Strides assumed for a table of `count` stages: the published 1 2 2 2 1 2, and ones after it.

    A shorter table halves in its last four stages, which keeps the whole network's stride at 32.
    """
    published = tuple(stage.stride for stage in PUBLISHED_STAGES)
    if count >= len(published):
        return published + (1,) * (count - len(published))
    return ((1,) * len(published) + (2,) * 4)[-count:]


def _infer_stage(shapes: Mapping[str, tuple[int, ...]], prefix: str, c_in: int) -> Stage | None:
    """One row of the table from its first block's shapes, with stride 1 for the caller to set, or None."""
    block = f"{prefix}0.block."
    convs = [shape for i in range(4) if (shape := _conv_shape(shapes, f"{block}{i}.0.weight")) is not None]
    gated = any(f"{block}{i}.fc1.weight" in shapes for i in (1, 2))
    if len(convs) not in ((2, 3) if gated else (1, 2)) or (len(convs) > 1 and convs[0][0] % c_in):
        return None
    kernel = convs[-2][2] if gated else convs[0][2]
    expand = convs[-1][1] // c_in if len(convs) > 1 else 1
    layers = 1
    while f"{prefix}{layers}.block.0.0.weight" in shapes:
        layers += 1
    return Stage("mbconv" if gated else "fused", expand, kernel, 1, convs[-1][0], layers)


def _conv_shape(shapes: Mapping[str, tuple[int, ...]], key: str) -> tuple[int, ...] | None:
    shape = shapes.get(key)
    return tuple(shape) if shape is not None and len(shape) == 4 else None
