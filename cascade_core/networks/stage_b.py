"""Stage B, the decoder: diffusion of Stage A's latent, conditioned on Stage C's (Würstchen, section 3.1)."""

import torch
from torch import Tensor, nn

from .config import StageBConfig
from .layers import layer_norm_2d, resize
from .unet import UNet


class StageB(UNet):
    """Predicts the noise in a Stage A latent from the semantic latent and the pooled text."""

    config: StageBConfig

    def __init__(self, config: StageBConfig, operations=nn):
        super().__init__(config, operations)
        self.effnet_mapper = self._map(config.c_effnet, operations)
        self.pixels_mapper = self._map(config.c_pixels, operations)
        self.clip_mapper = operations.Linear(config.c_clip, config.c_cond * config.c_clip_seq)
        self.clip_norm = operations.LayerNorm(config.c_cond, elementwise_affine=False, eps=1e-6)

    @classmethod
    def from_config(cls, config: dict, operations=nn) -> "StageB":
        """Builds it from the published constructor's argument names."""
        return cls(StageBConfig.from_dict(config), operations)

    def _map(self, c_in: int, operations) -> nn.Sequential:
        c = self.config.c_hidden[0]
        return nn.Sequential(
            operations.Conv2d(c_in, c * 4, kernel_size=1),
            nn.GELU(),
            operations.Conv2d(c * 4, c, kernel_size=1),
            layer_norm_2d(c, operations),
        )

    def _resampler(self, c_in: int, c_out: int, direction: str, boundary: int, operations) -> nn.Module:
        conv = operations.Conv2d if direction == "down" else operations.ConvTranspose2d
        return nn.Sequential(layer_norm_2d(c_in, operations), conv(c_in, c_out, kernel_size=2, stride=2))

    def embed_conditions(self, clip: Tensor) -> Tensor:
        """Maps the pooled text to tokens.  clip: (B, 1, c_clip) or (B, c_clip) -> (B, c_clip_seq, c_cond)"""
        clip = clip[:, None] if clip.ndim == 2 else clip
        return self.clip_norm(
            self.clip_mapper(clip).unflatten(-1, (self.config.c_clip_seq, -1)).flatten(1, 2)
        )

    def map_conditions(self, x: Tensor, effnet: Tensor, pixels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Maps effnet and pixels to the positions of the embedded x.

        x: (B, c_in, H, W) -> (B, c_hidden[0], H / patch, W / patch) each, added to the embedding of x
        """
        if pixels is None:  # zeros are mapped too, since Stage B was trained with the mapper's bias
            pixels = x.new_zeros(x.shape[0], self.config.c_pixels, 8, 8)
        size = (x.shape[-2] // self.config.patch_size, x.shape[-1] // self.config.patch_size)
        return (
            self.effnet_mapper(resize(effnet, size).to(x.dtype)),
            resize(self.pixels_mapper(pixels), size),
        )

    def forward(
        self,
        x: Tensor,
        r: Tensor,
        effnet: Tensor,
        clip: Tensor,
        pixels: Tensor | None = None,
        sca: Tensor | None = None,
    ) -> Tensor:
        """Predicts the noise in x.

        x: (B, c_in, H, W), r: (B,) noise condition in [0, 1], on any device, effnet: (B, c_effnet, h, w) of any size,
        pixels: (B, c_pixels, h, w), absent: zeros -> (B, c_out, H, W)
        """
        timesteps = self.embed_timesteps(r, {"sca": sca}).to(x)
        tokens = self.embed_conditions(clip)
        h = self.embedding(x.contiguous(memory_format=torch.channels_last))
        for mapped in self.map_conditions(x, effnet, pixels):
            h = h + mapped
        return self.clf(self.run_levels(h, timesteps, tokens))
