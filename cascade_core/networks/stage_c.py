"""Stage C, the prior: text-conditional diffusion of the 16-channel semantic latent (Würstchen, section 3.2)."""

import torch
from torch import Tensor, nn

from .config import StageCConfig
from .layers import layer_norm_2d
from .unet import UNet


class Resample(nn.Module):
    """A 1×1 convolution, after (up) or before (down) a bilinear resize by two where `enabled`.

    Stage C as published keeps one resolution throughout (`switch_level=[False]`).
    """

    def __init__(self, c_in: int, c_out: int, direction: str, enabled: bool, operations=nn):
        super().__init__()
        factor = 2.0 if direction == "up" else 0.5
        scale = (
            nn.Upsample(scale_factor=factor, mode="bilinear", align_corners=True)
            if enabled
            else nn.Identity()
        )
        mapping = operations.Conv2d(c_in, c_out, kernel_size=1)
        self.blocks = nn.ModuleList([scale, mapping] if direction == "up" else [mapping, scale])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class StageC(UNet):
    """Predicts the noise in a semantic latent from text and image embeddings."""

    config: StageCConfig

    def __init__(self, config: StageCConfig, operations=nn):
        super().__init__(config, operations)
        c_tokens = config.c_cond * config.c_clip_seq
        self.clip_txt_mapper = operations.Linear(config.c_clip_text, config.c_cond)
        self.clip_txt_pooled_mapper = operations.Linear(config.c_clip_text_pooled, c_tokens)
        self.clip_img_mapper = operations.Linear(config.c_clip_img, c_tokens)
        self.clip_norm = operations.LayerNorm(config.c_cond, elementwise_affine=False, eps=1e-6)

    @classmethod
    def from_config(cls, config: dict, operations=nn) -> "StageC":
        """Builds it from the published constructor's argument names."""
        return cls(StageCConfig.from_dict(config), operations)

    def _resampler(self, c_in: int, c_out: int, direction: str, boundary: int, operations) -> nn.Module:
        enabled = self.config.switch_level[boundary]
        return nn.Sequential(
            layer_norm_2d(c_in, operations), Resample(c_in, c_out, direction, enabled, operations)
        )

    def embed_conditions(self, clip_text: Tensor, clip_text_pooled: Tensor, clip_img: Tensor) -> Tensor:
        """Maps all conditions to tokens.

        clip_text: (B, T, c_clip_text), pooled: (B, 1, c_clip_text_pooled) or (B, …), img: (B, N, c_clip_img)
        -> (B, T + c_clip_seq · (1 + N), c_cond)
        """
        pooled = clip_text_pooled[:, None] if clip_text_pooled.ndim == 2 else clip_text_pooled
        image = clip_img[:, None] if clip_img.ndim == 2 else clip_img
        tokens = [
            self.clip_txt_mapper(clip_text),
            self.clip_txt_pooled_mapper(pooled).unflatten(-1, (self.config.c_clip_seq, -1)).flatten(1, 2),
            self.clip_img_mapper(image).unflatten(-1, (self.config.c_clip_seq, -1)).flatten(1, 2),
        ]
        return self.clip_norm(torch.cat(tokens, dim=1))

    def forward(
        self,
        x: Tensor,
        r: Tensor,
        clip_text: Tensor,
        clip_text_pooled: Tensor,
        clip_img: Tensor,
        sca: Tensor | None = None,
        crp: Tensor | None = None,
        control: list[Tensor | None] | None = None,
    ) -> Tensor:
        """Predicts the noise in x.

        x: (B, c_in, H, W), r: (B,) noise condition in [0, 1], on any device -> (B, c_out, H, W);
        control: one residual (B, c_hidden, h, w) or None for each residual block, in the order they run.
        """
        timesteps = self.embed_timesteps(r, {"sca": sca, "crp": crp}).to(x)
        tokens = self.embed_conditions(clip_text, clip_text_pooled, clip_img)
        h = self.embedding(x.contiguous(memory_format=torch.channels_last))
        return self.clf(self.run_levels(h, timesteps, tokens, control or ()))
