"""ControlNet: a hint becomes one residual for each chosen residual block of Stage C."""

from torch import Tensor, nn

from .config import PUBLISHED_LARGE, PUBLISHED_LAST, ControlNetConfig
from .efficientnet import EfficientNetV2
from .layers import layer_norm_2d

SLOPE = 0.2  # of every LeakyReLU here


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
        """Builds it from the published constructor's argument names."""
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
    # In the published code, the first convolution is unpadded where it was replaced, that is for c_in != 3.
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
