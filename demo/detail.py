"""Decoders for training alone, which make latents and embeddings keep the details that other networks draw."""

from torch import Tensor, nn

from cascade_nodes.cascade_core.networks.layers import ResBlock

WIDTHS = (256, 192, 128, 64, 32)
PICTURE_WIDTHS = (256, 192, 128, 48, 24)


def _upwards(widths: tuple[int, ...]) -> list[nn.Module]:
    """Residual blocks of each width, at twice the size of those before."""
    layers: list[nn.Module] = []
    for i, width in enumerate(widths):
        if i:
            layers.append(nn.ConvTranspose2d(widths[i - 1], width, kernel_size=2, stride=2))
        layers += [ResBlock(width), ResBlock(width)]
    return [*layers, nn.Conv2d(widths[-1], 3, kernel_size=1)]


class DetailDecoder(nn.Module):
    """latent: (B, c_latent, h, w) -> image (B, 3, 16h, 16w)"""

    def __init__(self, c_latent: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(c_latent, WIDTHS[0], kernel_size=1), *_upwards(WIDTHS))

    def forward(self, latent: Tensor) -> Tensor:
        return self.layers(latent)


class EmbeddingDecoder(nn.Module):
    """embedding of a picture: (B, E) -> image (B, 3, 48, 48)"""

    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Linear(width, PICTURE_WIDTHS[0] * 9)
        self.layers = nn.Sequential(*_upwards(PICTURE_WIDTHS))

    def forward(self, embedding: Tensor) -> Tensor:
        return self.layers(self.first(embedding).unflatten(-1, (PICTURE_WIDTHS[0], 3, 3)))
