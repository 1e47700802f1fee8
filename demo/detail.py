"""Auxiliary decoder for the compressor's training: makes the latent keep what Stage B must redraw."""

from torch import Tensor, nn

from cascade_nodes.cascade_core.networks.layers import ResBlock

WIDTHS = (256, 192, 128, 96, 48)


class DetailDecoder(nn.Module):
    """latent: (B, c_latent, h, w) -> image (B, 3, 16h, 16w)"""

    def __init__(self, c_latent: int):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(c_latent, WIDTHS[0], kernel_size=1)]
        for i, width in enumerate(WIDTHS):
            if i:
                layers.append(nn.ConvTranspose2d(WIDTHS[i - 1], width, kernel_size=2, stride=2))
            layers += [ResBlock(width), ResBlock(width)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(WIDTHS[-1], 3, kernel_size=1))

    def forward(self, latent: Tensor) -> Tensor:
        return self.layers(latent)
