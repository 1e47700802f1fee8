"""The blocks that Stage B and Stage C are made of.

Shapes: B batch, C channels, H × W positions, T conditioning tokens, R timestep embedding. Feature maps are
(B, C, H, W) in channels-last memory, so that the permutes around LayerNorm and Linear are views, not copies.

`operations` is the namespace that Linear, Conv2d, ConvTranspose2d and LayerNorm are taken from: `torch.nn`, or a
host's casting layers. Parameters outside such layers are cast where they are used.

Source: Würstchen (arXiv 2306.00637), appendix on architecture; ConvNeXt V2 (arXiv 2301.00808) for the
residual block and its global response normalisation.
"""

import math
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def timestep_embedding(r: Tensor, width: int, max_positions: int = 10_000) -> Tensor:
    """Sinusoidal embedding of the noise condition.  r: (B,) in [0, 1] -> (B, width) float32

    Computed in float32 whatever the weights' dtype: rounding r to bfloat16 moves it by up to 20 of the
    10,000 positions.
    """
    half = width // 2
    frequencies = torch.arange(half, device=r.device, dtype=torch.float32)
    frequencies = frequencies.mul(-math.log(max_positions) / max(half - 1, 1)).exp()
    angles = (r.float() * max_positions)[:, None] * frequencies[None, :]  # (B, width // 2)
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return F.pad(embedding, (0, 1)) if width % 2 else embedding


def resize(x: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Bilinear resize with aligned corners, the only resize in the networks.  (B, C, h, w) -> (B, C, *size)"""
    if x.shape[-2:] == torch.Size(size):
        return x
    # In float32: half-precision bilinear weights shift the picture by a visible fraction of a position.
    return F.interpolate(x.float(), size=tuple(size), mode="bilinear", align_corners=True).to(x.dtype)


@cache
def _layer_norm_2d_class(base: type[nn.LayerNorm]) -> type[nn.LayerNorm]:
    class LayerNorm2d(base):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    return LayerNorm2d


def layer_norm_2d(channels: int, operations, affine: bool = False, eps: float = 1e-6) -> nn.Module:
    """LayerNorm over the channels of (B, C, H, W), built on the injected LayerNorm so that a host can cast it."""
    return _layer_norm_2d_class(operations.LayerNorm)(channels, elementwise_affine=affine, eps=eps)


class GlobalResponseNorm(nn.Module):
    """Scales each channel by its share of the response over all positions (ConvNeXt V2, section 3.2).

    x: (B, H, W, C) -> (B, H, W, C)
    """

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        # In float32, since a sum of squares over all positions overflows fp16.
        wide = torch.promote_types(x.dtype, torch.float32)
        response = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=wide)  # (B, 1, 1, C)
        share = response / (response.mean(dim=-1, keepdim=True) + 1e-6)
        gain = 1 + self.gamma.to(share) * share
        # gamma · (x · share) + beta + x, in one pass over x
        return torch.addcmul(self.beta.to(x), x, gain.to(x))


class ChannelMLP(nn.Sequential):
    """Position-wise MLP with a fourfold hidden width.  (B, H, W, c_in) -> (B, H, W, c_out)"""

    def __init__(self, c_in: int, c_out: int, dropout: float, operations):
        super().__init__(
            operations.Linear(c_in, c_out * 4),
            nn.GELU(),
            GlobalResponseNorm(c_out * 4),
            nn.Dropout(dropout),
            operations.Linear(c_out * 4, c_out),
        )


class ResBlock(nn.Module):
    """ConvNeXt block with global response normalisation.  x: (B, C, H, W), skip: (B, C_skip, H, W) -> (B, C, H, W)"""

    def __init__(self, c: int, c_skip: int = 0, kernel_size: int = 3, dropout: float = 0.0, operations=nn):
        super().__init__()
        self.depthwise = operations.Conv2d(c, c, kernel_size=kernel_size, padding=kernel_size // 2, groups=c)
        self.norm = layer_norm_2d(c, operations)
        self.channelwise = ChannelMLP(c + c_skip, c, dropout, operations)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        h = self.norm(self.depthwise(x))  # (B, C, H, W)
        if skip is not None:
            h = torch.cat([h, skip], dim=1)  # (B, C + C_skip, H, W)
        h = self.channelwise(h.permute(0, 2, 3, 1))  # (B, H, W, C)
        return x + h.permute(0, 3, 1, 2)


class FeedForwardBlock(nn.Module):
    """ResBlock without the convolution.  x: (B, C, H, W) -> (B, C, H, W)"""

    def __init__(self, c: int, dropout: float = 0.0, operations=nn):
        super().__init__()
        self.norm = layer_norm_2d(c, operations)
        self.channelwise = ChannelMLP(c, c, dropout, operations)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.channelwise(self.norm(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Multi-head attention.  queries: (B, N, C), keys and values from: (B, M, C) -> (B, N, C)

    The published fused `in_proj` is kept as three layers, under the names that hosts and LoRA files use.
    """

    def __init__(self, c: int, heads: int, dropout: float = 0.0, operations=nn):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.to_q = operations.Linear(c, c)
        self.to_k = operations.Linear(c, c)
        self.to_v = operations.Linear(c, c)
        self.out_proj = operations.Linear(c, c)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            projection.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N or M, C / heads)
            for projection in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        h = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.project(h.transpose(1, 2).flatten(2))

    def project(self, h: Tensor) -> Tensor:
        """Output projection, whose result is added to the residual stream.  (B, N, C) -> (B, N, C)"""
        return self.out_proj(h)


class Attention2D(nn.Module):
    """Attention from every position to the conditioning, and to all positions where `self_attn`.

    x: (B, C, H, W), context: (B, T, C) -> (B, C, H, W)
    """

    def __init__(self, c: int, heads: int, dropout: float = 0.0, operations=nn):
        super().__init__()
        self.attn = Attention(c, heads, dropout, operations)

    def forward(self, x: Tensor, context: Tensor, self_attn: bool = False) -> Tensor:
        height, width = x.shape[-2:]
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, H·W, C)
        if self_attn:
            context = torch.cat([tokens, context], dim=1)  # (B, H·W + T, C)
        h = self.attn(tokens, context)
        return h.unflatten(1, (height, width)).permute(0, 3, 1, 2)


class AttnBlock(nn.Module):
    """Attention to the conditioning tokens.  x: (B, C, H, W), tokens: (B, T, C_cond) -> (B, C, H, W)"""

    def __init__(
        self, c: int, c_cond: int, heads: int, self_attn: bool = True, dropout: float = 0.0, operations=nn
    ):
        super().__init__()
        self.self_attn = self_attn
        self.norm = layer_norm_2d(c, operations)
        self.attention = Attention2D(c, heads, dropout, operations)
        self.kv_mapper = nn.Sequential(nn.SiLU(), operations.Linear(c_cond, c))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return x + self.attention(self.norm(x), self.kv_mapper(tokens), self_attn=self.self_attn)


class TimestepBlock(nn.Module):
    """Scales and shifts every channel by the noise condition, and by further ones (`sca`, `crp`).

    x: (B, C, H, W), embeddings: (B, R · (1 + len(conds))) -> (B, C, H, W)
    """

    def __init__(self, c: int, c_timestep: int, conds: tuple[str, ...] = ("sca",), operations=nn):
        super().__init__()
        self.conds = tuple(conds)
        self.mapper = operations.Linear(c_timestep, c * 2)
        for name in self.conds:
            setattr(self, f"mapper_{name}", operations.Linear(c_timestep, c * 2))

    def forward(self, x: Tensor, embeddings: Tensor) -> Tensor:
        scale, shift = self.modulation(embeddings)
        return torch.addcmul(shift, x, 1 + scale)

    def modulation(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, shift), each (B, C, 1, 1): the sum over all conditions."""
        first, *others = embeddings.chunk(len(self.conds) + 1, dim=1)
        modulation = self.mapper(first)  # (B, 2C)
        for name, embedding in zip(self.conds, others, strict=True):
            modulation = modulation + getattr(self, f"mapper_{name}")(embedding)
        scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
        return scale, shift
