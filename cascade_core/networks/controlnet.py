"""ControlNet: a hint becomes one residual for each chosen residual block of Stage C."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import CascadeError
from .compressor import unpublished
from .config import Config
from .efficientnet import (
    PUBLISHED_LAST,
    PUBLISHED_STAGES,
    PUBLISHED_STEM,
    EfficientNetV2,
    Stage,
    infer_efficientnet,
    stage_table,
)
from .layers import layer_norm_2d

# Number of projections -> Stage C's residual blocks that they are for.
PUBLISHED_BLOCKS = {8: [0, 4, 8, 12, 51, 55, 59, 63], 64: list(range(64))}
PUBLISHED_LARGE = {"c_wide": 4096 * 4, "c_hidden": 1024, "layers": 8, "c_last": PUBLISHED_LAST}
SLOPE = 0.2  # of every LeakyReLU here


@dataclass(frozen=True)
class ControlNetConfig(Config):
    """A ControlNet; the first four are the published constructor's arguments, the others give another size.

    `bottleneck_mode` names the backbone: "effnet" (None means this one) for images, "large" for the
    compressor's latents, "simple" for maps of features. `c_last` is the backbone's output (None: 1280, for
    simple `c_in`); `stem`, `stages` and `drop_path` shape "effnet" as in CompressorConfig; `c_wide` is the
    first layer of "large" (None: 16384) and "simple" (None: 4·c_in); `c_hidden` and `layers` are the residual
    blocks of "large".
    """

    c_in: int = 3
    c_proj: int = 2048
    proj_blocks: tuple[int, ...] = ()
    bottleneck_mode: str | None = None
    c_last: int | None = None
    stem: int = PUBLISHED_STEM
    stages: tuple[Stage, ...] = PUBLISHED_STAGES
    c_wide: int | None = None
    c_hidden: int = PUBLISHED_LARGE["c_hidden"]
    layers: int = PUBLISHED_LARGE["layers"]
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", stage_table(self.stages))
        blocks = self.proj_blocks
        if not blocks or min(blocks) < 0 or len(set(blocks)) != len(blocks):
            raise CascadeError(
                f"ControlNet's proj_blocks is {list(blocks or ())}, expected the numbers of Stage C's "
                "residual blocks, each once, such as [0, 4, 8, 12, 51, 55, 59, 63]; correct the config."
            )
        if self.bottleneck_mode not in (None, *_BACKBONES):
            raise CascadeError(
                f"ControlNet's bottleneck_mode is {self.bottleneck_mode!r}, expected one of "
                f"{', '.join(_BACKBONES)}; correct the config."
            )

    @property
    def hint_scale(self) -> int:
        """Pixels of the hint for each position of Stage C's latent, a side."""
        return 32 if self.bottleneck_mode in (None, "effnet") else 1


class ControlNet(nn.Module):
    """Backbone and one two-layer projection for each of `proj_blocks`."""

    def __init__(self, config: ControlNetConfig, operations=nn):
        super().__init__()
        self.config = config
        self.proj_blocks = config.proj_blocks
        self.backbone, c_last = _BACKBONES[config.bottleneck_mode or "effnet"](config, operations)
        self.projections = nn.ModuleList(
            _projection(c_last, config.c_proj, operations) for _ in self.proj_blocks
        )

    @classmethod
    def from_config(cls, config: dict, operations=nn) -> "ControlNet":
        """Built from the published constructor's argument names."""
        return cls(ControlNetConfig.from_dict(config), operations)

    def forward(self, hint: Tensor) -> list[Tensor | None]:
        """hint: (B, c_in, H, W) -> residuals (B, c_proj, h, w) by Stage C's residual block, None in the gaps.

        "effnet" divides height and width by 32, the others keep them.
        """
        features = self.backbone(hint)  # (B, c_last, h, w)
        residuals: list[Tensor | None] = [None] * (max(self.proj_blocks) + 1)
        for block, projection in zip(self.proj_blocks, self.projections, strict=True):
            residuals[block] = projection(features)
        return residuals


def _effnet_backbone(config: ControlNetConfig, operations) -> tuple[nn.Module, int]:
    c_last = config.c_last or PUBLISHED_LAST
    # The published first convolution is unpadded wherever it was replaced, which is for c_in != 3.
    padding = 1 if config.c_in == 3 else 0
    backbone = EfficientNetV2(
        config.c_in, config.stem, config.stages, c_last, padding, config.drop_path, operations
    )
    return backbone, c_last


def _large_backbone(config: ControlNetConfig, operations) -> tuple[nn.Module, int]:
    c_wide, c_hidden = config.c_wide or PUBLISHED_LARGE["c_wide"], config.c_hidden
    c_last = config.c_last or PUBLISHED_LARGE["c_last"]
    backbone = nn.Sequential(
        operations.Conv2d(config.c_in, c_wide, kernel_size=1),
        nn.LeakyReLU(SLOPE, inplace=True),
        operations.Conv2d(c_wide, c_hidden, kernel_size=1),
        *(CNetResBlock(c_hidden, operations) for _ in range(config.layers)),
        operations.Conv2d(c_hidden, c_last, kernel_size=1),
    )
    return backbone, c_last


def _simple_backbone(config: ControlNetConfig, operations) -> tuple[nn.Module, int]:
    c_wide, c_last = config.c_wide or 4 * config.c_in, config.c_last or config.c_in
    backbone = nn.Sequential(
        operations.Conv2d(config.c_in, c_wide, kernel_size=3, padding=1),
        nn.LeakyReLU(SLOPE, inplace=True),
        operations.Conv2d(c_wide, c_last, kernel_size=3, padding=1),
    )
    return backbone, c_last


_BACKBONES = {"effnet": _effnet_backbone, "large": _large_backbone, "simple": _simple_backbone}


class CNetResBlock(nn.Module):
    """Norm, GELU and 3×3 convolution, twice, around a skip.  x: (B, C, H, W) -> (B, C, H, W)"""

    def __init__(self, channels: int, operations=nn):
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            conv = operations.Conv2d(channels, channels, kernel_size=3, padding=1)
            layers += [layer_norm_2d(channels, operations, affine=True, eps=1e-5), nn.GELU(), conv]
        self.blocks = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.blocks(x)


def _projection(c_last: int, c_proj: int, operations) -> nn.Sequential:
    inner = operations.Conv2d(c_last, c_last, kernel_size=1, bias=False)
    outer = operations.Conv2d(c_last, c_proj, kernel_size=1, bias=False)
    nn.init.zeros_(outer.weight)  # an untrained ControlNet changes nothing
    return nn.Sequential(inner, nn.LeakyReLU(SLOPE, inplace=True), outer)


def infer_controlnet(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """Config of the ControlNet whose state dict has these keys and shapes, or None where it is no ControlNet.

    The widths of a published backbone are left out, those of another are given whole. Which blocks the
    projections are for is not in the shapes: 8 and 64 of them mean the published lists, another number the
    first so many blocks.
    """
    count = 0
    while f"projections.{count}.0.weight" in shapes:
        count += 1
    inner, outer = shapes.get("projections.0.0.weight"), shapes.get("projections.0.2.weight")
    backbone = _infer_backbone(shapes)
    if backbone is None or inner is None or outer is None or len(inner) != 4 or len(outer) != 4:
        return None
    mode, c_last, config = backbone
    if inner[:2] != (c_last, c_last) or outer[1] != c_last:
        return None
    return {
        "c_in": config.pop("c_in"),
        "c_proj": outer[0],
        "proj_blocks": list(PUBLISHED_BLOCKS.get(count, range(count))),
        "bottleneck_mode": mode,
        **config,
    }


def _infer_backbone(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, int, dict[str, Any]] | None:
    """(mode, c_last, the arguments c_in and, where they are not the published ones, the widths), or None."""
    effnet = infer_efficientnet(shapes, "backbone.")
    if effnet is not None:
        c_in, c_last = effnet.pop("c_in"), effnet["c_last"]
        return "effnet", c_last, {"c_in": c_in, **unpublished(effnet)}
    first, second = shapes.get("backbone.0.weight"), shapes.get("backbone.2.weight")
    if first is None or second is None or len(first) != 4 or len(second) != 4 or first[0] != second[1]:
        return None
    c_wide, c_in = first[:2]
    if first[2:] == (3, 3) == second[2:]:
        found, published = {"c_wide": c_wide, "c_last": second[0]}, {"c_wide": 4 * c_in, "c_last": c_in}
        return "simple", second[0], {"c_in": c_in, **({} if found == published else found)}
    layers = 0
    while f"backbone.{3 + layers}.blocks.0.weight" in shapes:
        layers += 1
    last = shapes.get(f"backbone.{3 + layers}.weight")
    if first[2:] != (1, 1) or last is None or len(last) != 4 or last[1] != second[0]:
        return None
    found = {"c_wide": c_wide, "c_hidden": second[0], "layers": layers, "c_last": last[0]}
    return "large", last[0], {"c_in": c_in, **({} if found == PUBLISHED_LARGE else found)}
