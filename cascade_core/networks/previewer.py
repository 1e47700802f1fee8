"""The previewer: a small convolutional decoder of Stage C latents, 16×24×24 -> 3×192×192."""

import torch
from torch import Tensor, nn

from .config import PreviewerConfig
from .efficientnet import BatchNorm2d


class Previewer(nn.Module):
    """Decoder of Stage C's latent.

    latent: (B, c_in, h, w) -> image: (B, c_out, 8h, 8w), about [0, 1]
    """

    def __init__(self, config: PreviewerConfig, operations=nn):
        super().__init__()
        self.config = config
        c, half, quarter = config.c_hidden, config.c_hidden // 2, config.c_hidden // 4
        layers: list[nn.Module] = []
        for layer, width in (
            (operations.Conv2d(config.c_in, c, kernel_size=1), c),
            (operations.Conv2d(c, c, kernel_size=3, padding=1), c),
            # (B, c / 2, 2h, 2w)
            (operations.ConvTranspose2d(c, half, kernel_size=2, stride=2), half),
            (operations.Conv2d(half, half, kernel_size=3, padding=1), half),
            # (B, c / 4, 4h, 4w)
            (operations.ConvTranspose2d(half, quarter, kernel_size=2, stride=2), quarter),
            (operations.Conv2d(quarter, quarter, kernel_size=3, padding=1), quarter),
            # (B, c / 4, 8h, 8w)
            (operations.ConvTranspose2d(quarter, quarter, kernel_size=2, stride=2), quarter),
            (operations.Conv2d(quarter, quarter, kernel_size=3, padding=1), quarter),
        ):
            layers += [layer, nn.GELU(), BatchNorm2d(width)]
        self.blocks = nn.Sequential(*layers, operations.Conv2d(quarter, config.c_out, kernel_size=1))

    @classmethod
    def from_config(cls, config: dict, operations=nn) -> "Previewer":
        """Builds it from the published constructor's argument names."""
        return cls(PreviewerConfig.from_dict(config), operations)

    def forward(self, latent: Tensor) -> Tensor:
        # Otherwise a card's convolutions convert each feature map to channels-last and back, in twice the memory.
        return self.blocks(latent.contiguous(memory_format=torch.channels_last))
