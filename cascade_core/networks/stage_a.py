"""Stage A, the VQGAN: pictures to a 4-channel latent at a quarter of the size, and back (Würstchen, section 3.1).

Latents are in the published units: the codebook's divided by `scale_factor` (0.43), which is what Stage B diffuses.
"""

import torch
from torch import Tensor, nn

from .config import StageAConfig
from .efficientnet import BatchNorm2d

HIDDEN_VALUES = 1 << 25  # of a residual block's MLP, kept in memory at a time


class MixingResidualBlock(nn.Module):
    """Depthwise convolution, then a position-wise MLP, each gated by learned gammas.  (B, C, H, W) -> same

    Named as in diffusers' PaellaVQModel; the published code has a second ResBlock here.
    """

    def __init__(self, c: int, c_hidden: int, operations=nn):
        super().__init__()
        self.norm1 = operations.LayerNorm(c, elementwise_affine=False, eps=1e-6)
        self.depthwise = nn.Sequential(
            nn.ReplicationPad2d(1), operations.Conv2d(c, c, kernel_size=3, groups=c)
        )
        self.norm2 = operations.LayerNorm(c, elementwise_affine=False, eps=1e-6)
        self.channelwise = nn.Sequential(
            operations.Linear(c, c_hidden), nn.GELU(), operations.Linear(c_hidden, c)
        )
        self.gammas = nn.Parameter(torch.zeros(6))
        self.c_hidden = c_hidden

    def forward(self, x: Tensor) -> Tensor:
        scale1, shift1, gate1, scale2, shift2, gate2 = self.gammas.to(x)
        h = torch.addcmul(shift1, self.norm1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), 1 + scale1)
        x = torch.addcmul(x, self.depthwise(h), gate1)
        h = torch.addcmul(shift2, self.norm2(x.permute(0, 2, 3, 1)), 1 + scale2)  # (B, H, W, C)
        return torch.addcmul(x, self._mlp(h).permute(0, 3, 1, 2), gate2)

    def _mlp(self, h: Tensor) -> Tensor:
        """Runs the MLP, for a large picture on a few rows at a time, since its hidden values take most of the memory.

        h: (B, H, W, C) -> (B, H, W, C)
        """
        rows = max(HIDDEN_VALUES // (self.c_hidden * h.shape[0] * h.shape[2]), 1)
        if rows >= h.shape[1] or torch.is_grad_enabled():
            return self.channelwise(h)
        return torch.cat([self.channelwise(part) for part in h.split(rows, dim=1)], dim=1)


class Codebook(nn.Module):
    """Nearest-neighbour quantisation.  latent: (B, C, H, W) -> (quantised, indices (B, H, W))"""

    def __init__(self, size: int, channels: int):
        super().__init__()
        self.codebook = nn.Embedding(size, channels)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.codebook.weight.to(latent)  # (K, C)
        tokens = latent.permute(0, 2, 3, 1)  # (B, H, W, C)
        # |z - c|² without |z|², which is the same for every code
        distance = codes.square().sum(1) - 2 * tokens @ codes.T  # (B, H, W, K)
        indices = distance.argmin(-1)
        return codes[indices].permute(0, 3, 1, 2), indices


class StageA(nn.Module):
    """VQGAN with encode, quantize and decode. Each level halves the size, the first by pixel unshuffling."""

    def __init__(self, config: StageAConfig, operations=nn):
        super().__init__()
        self.config = config
        widths = [config.c_hidden // 2**i for i in reversed(range(config.levels))]

        self.in_block = nn.Sequential(
            nn.PixelUnshuffle(2), operations.Conv2d(3 * 4, widths[0], kernel_size=1)
        )
        down: list[nn.Module] = []
        for i, width in enumerate(widths):
            if i:
                down.append(operations.Conv2d(widths[i - 1], width, kernel_size=4, stride=2, padding=1))
            down.append(MixingResidualBlock(width, width * 4, operations))
        to_latent = operations.Conv2d(widths[-1], config.c_latent, kernel_size=1, bias=False)
        down.append(nn.Sequential(to_latent, BatchNorm2d(config.c_latent)))
        self.down_blocks = nn.Sequential(*down)

        self.vquantizer = Codebook(config.codebook_size, config.c_latent)

        up: list[nn.Module] = [nn.Sequential(operations.Conv2d(config.c_latent, widths[-1], kernel_size=1))]
        for i, width in enumerate(reversed(widths)):
            up += [
                MixingResidualBlock(width, width * 4, operations)
                for _ in range(config.bottleneck_blocks if i == 0 else 1)
            ]
            if i < config.levels - 1:
                up.append(operations.ConvTranspose2d(width, width // 2, kernel_size=4, stride=2, padding=1))
        self.up_blocks = nn.Sequential(*up)
        self.out_block = nn.Sequential(operations.Conv2d(widths[0], 3 * 4, kernel_size=1), nn.PixelShuffle(2))

    @classmethod
    def from_config(cls, config: dict, operations=nn) -> "StageA":
        """Builds it from the published constructor's argument names."""
        return cls(StageAConfig.from_dict(config), operations)

    def encode(self, image: Tensor) -> Tensor:
        """image: (B, 3, H, W) in [0, 1], H and W multiples of 2^levels -> latent (B, c_latent, H/4, W/4)"""
        image = image.contiguous(memory_format=torch.channels_last)
        return self.down_blocks(self.in_block(image)) / self.config.scale_factor

    def quantize(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """latent: (B, c_latent, h, w) -> (nearest codes in the same units, their indices (B, h, w))"""
        quantised, indices = self.vquantizer(latent * self.config.scale_factor)
        return quantised / self.config.scale_factor, indices

    def decode(self, latent: Tensor) -> Tensor:
        """latent: (B, c_latent, h, w) -> image (B, 3, 4h, 4w), about [0, 1]"""
        latent = latent.contiguous(memory_format=torch.channels_last)
        return self.out_block(self.up_blocks(latent * self.config.scale_factor))
