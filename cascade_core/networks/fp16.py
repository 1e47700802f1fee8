"""fp16 without overflow: Stage B and C with their residual stream held as a fraction of itself.

fp16 ends at 65,504. In a trained Stage C the residual stream x grows past that, which gives black pictures. So the
network holds x / s, and computes what is added to x as that fraction from the start:

    x                   divided once, at its start; a ControlNet's residual when it is added
    what reads x        LayerNorms with eps / s²; a depthwise convolution before one as W·(x/s) + b/s: both norms see
                        what they see in the published network
    what is added to x  the last layer of a block as W·(h/s) + b/s; of a timestep's modulation the shift alone
    a skip              stays divided; what it is concatenated with is divided too

s is a power of two, so that each of these is exact: in float32 nothing changes. In fp16, accuracy does not change
either, because the stream starts with a standard deviation of one, and fp16 reaches as far below one (6e-8) as above.
The loss is 6e-8 · s, beside the usual rounding of fp16, 5e-4. s is the same for every network: nothing is measured,
no step repeated, and a picture depends on its seed alone.

No weight changes, nor any name in the state dict. `scale_residual_stream` gives the network and its blocks the classes
below, each of which computes what its base does on the divided stream; biases are divided where a layer uses them, so
that LoRAs of any host apply as they are. Undivided values are bounded otherwise: hidden values are products with a
normed input, and attention and the response norm sum in float32.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..errors import CascadeError
from .layers import (
    Attention,
    AttnBlock,
    ChannelMLP,
    FeedForwardBlock,
    GlobalResponseNorm,
    ResBlock,
    TimestepBlock,
    resize,
)
from .stage_b import StageB
from .stage_c import StageC
from .unet import UNet

# fp16 then holds values up to 67 million, and those above 1 / 16 with all of its 11 bits.
STREAM_SCALE = 1024.0

_AFFINE = (F.linear, torch.conv2d, torch.conv_transpose2d)  # each as (x, weight, bias, …)


def scale_residual_stream(network: UNet, scale: float = STREAM_SCALE) -> None:
    """Lets Stage B or C hold its residual stream as x / scale, a power of two. 1: as published."""
    for norm in stream_norms(network):
        norm.eps *= (stream_scale(network) / scale) ** 2
    for module in network.modules():
        plain = _PLAIN_CLASSES.get(type(module), type(module))
        if plain in _SCALED_CLASSES:
            module.__class__ = plain if scale == 1 else _SCALED_CLASSES[plain]
            module.__dict__.pop("stream_scale", None)
            if scale != 1:
                module.__dict__["stream_scale"] = scale


def stream_scale(network: UNet) -> float:
    """The s by which the network divides its residual stream; 1 as published."""
    return network.stream_scale if isinstance(network, ScaledUNet) else 1.0


def stream_norms(network: UNet) -> Iterator[Any]:
    """The LayerNorms that read the residual stream."""
    for block in network.modules():
        if isinstance(block, ResBlock | AttnBlock | FeedForwardBlock):
            yield block.norm
    for resampler in (*network.down_downscalers, *network.up_upscalers):
        if isinstance(resampler, nn.Sequential):
            yield resampler[0]
    yield network.clf[0]


class ScaledResponseNorm(GlobalResponseNorm):
    """x: (B, H, W, C) divided by `scale` -> (B, H, W, C) divided by s"""

    stream_scale: float

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        s = self.stream_scale
        wide = torch.promote_types(x.dtype, torch.float32)
        response = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=wide) * scale  # (B, 1, 1, C)
        share = response / (response.mean(dim=-1, keepdim=True) + 1e-6)
        gain = divide(1 + self.gamma.to(share) * share, s / scale)
        return torch.addcmul(divide(self.beta.to(x), s), x, gain.to(x))


class ScaledMLP(ChannelMLP):
    """x: (B, H, W, c_in) divided by `scale` -> (B, H, W, c_out) divided by s"""

    stream_scale: float

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        expand, gelu, response_norm, dropout, contract = self
        h = divided_bias(expand, x, scale)  # (B, H, W, 4 · c_out)
        h = gelu(h) if scale == 1 else divided_gelu(h, scale)
        h = dropout(response_norm(h, scale))
        return divided_bias(contract, h, self.stream_scale)


class ScaledResBlock(ResBlock):
    """x and skip divided by s -> x divided by s"""

    stream_scale: float

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        h = self.norm(divided_bias(self.depthwise, x, self.stream_scale))  # (B, C, H, W)
        scale = 1.0
        if skip is not None:
            scale = self.stream_scale
            h = torch.cat([divide(h, scale), skip], dim=1)  # (B, C + C_skip, H, W)
        h = self.channelwise(h.permute(0, 2, 3, 1), scale)  # (B, H, W, C)
        return x + h.permute(0, 3, 1, 2)


class ScaledAttention(Attention):
    """Queries and context as published -> what is added to the stream, divided by s"""

    stream_scale: float

    def project(self, h: Tensor) -> Tensor:
        h = divide(h, self.stream_scale)
        return divided_bias(self.out_proj, h, self.stream_scale)


class ScaledTimestepBlock(TimestepBlock):
    """x divided by s -> x divided by s: its scale as published, its shift divided"""

    stream_scale: float

    def modulation(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        s = self.stream_scale
        first, *others = divide(embeddings, s).chunk(len(self.conds) + 1, dim=1)
        modulation = divided_bias(self.mapper, first, s)  # (B, 2C)
        for name, embedding in zip(self.conds, others, strict=True):
            modulation = modulation + divided_bias(getattr(self, f"mapper_{name}"), embedding, s)
        scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
        return scale * s, shift


class ScaledUNet(UNet):
    """The levels of Stage B or C on x / s. The norm that `clf` begins with undoes the division."""

    stream_scale: float

    def run_levels(
        self, x: Tensor, timesteps: Tensor, tokens: Tensor, control: Sequence[Tensor | None] = ()
    ) -> Tensor:
        return super().run_levels(divide(x, self.stream_scale), timesteps, tokens, control)

    def _apply_resampler(self, x: Tensor, resampler: Any) -> Tensor:
        if isinstance(resampler, nn.Identity):
            return x
        norm, mapping = resampler
        return divided_bias(mapping, divide(norm(x), self.stream_scale), self.stream_scale)

    def _apply_mapper(self, x: Tensor, mapper: nn.Module) -> Tensor:
        return divided_bias(mapper, x, self.stream_scale)

    def _add_control(self, x: Tensor, residual: Tensor) -> Tensor:
        return x + divide(resize(residual, x.shape[-2:]), self.stream_scale).to(x)


class ScaledStageB(ScaledUNet, StageB):
    """Stage B on a divided residual stream."""


class ScaledStageC(ScaledUNet, StageC):
    """Stage C on a divided residual stream."""


_SCALED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    GlobalResponseNorm: ScaledResponseNorm,
    ChannelMLP: ScaledMLP,
    ResBlock: ScaledResBlock,
    Attention: ScaledAttention,
    TimestepBlock: ScaledTimestepBlock,
    StageB: ScaledStageB,
    StageC: ScaledStageC,
}
_PLAIN_CLASSES = {scaled: plain for plain, scaled in _SCALED_CLASSES.items()}


def divide(x: Tensor, scale: float) -> Tensor:
    """x / scale, for a power of two."""
    return x if scale == 1 else x * (1 / scale)


def divide_(x: Tensor, scale: float) -> Tensor:
    """x / scale in place, for a power of two."""
    return x if scale == 1 else x.mul_(1 / scale)


def divided_gelu(x: Tensor, scale: float) -> Tensor:
    """`divided_gelu_`, or out of place where a backward pass needs x."""
    if torch.is_grad_enabled() and x.requires_grad:
        return divide(F.gelu(x.float() * scale), scale).to(x.dtype)
    return divided_gelu_(x, scale)


def divided_gelu_(x: Tensor, scale: float) -> Tensor:
    """GELU(scale · x) / scale in place, also where scale · x is past the end of x's dtype.  x: (B, H, …)"""
    for rows in x.chunk(8, dim=1):  # a few at a time, for the memory that float32 takes
        rows.copy_(divide(F.gelu(rows.float() * scale), scale))
    return x


def divided_bias(layer: nn.Module, x: Tensor, scale: float) -> Tensor:
    """layer(scale · x) / scale without either product: the layer's bias is divided instead.

    Raises CascadeError where the layer does not reach PyTorch's own linear or convolution.
    """
    if scale == 1:
        return layer(x)
    with _DividedBias(scale) as mode:
        out = layer(x)
    if not mode.reached:
        raise CascadeError(
            f"{type(layer).__name__} is not computed by PyTorch here, so that fp16 would overflow; switch "
            "that off (in ComfyUI: --fast cublas_ops), or choose dtype bf16 or fp32."
        )
    return out


class _DividedBias(TorchFunctionMode):
    """Divides the bias at the moment a layer uses it, after a host has moved, cast and patched it."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale
        self.reached = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _AFFINE and len(args) > 2:  # a product without a bias is that of a LoRA in training
            x, weight, bias, *others = args
            self.reached, args = True, (x, weight, divide(bias, self.scale), *others)
        return func(*args, **(kwargs or {}))
