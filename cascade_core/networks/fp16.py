"""fp16 without overflow: the residual stream held as a fraction of itself.

fp16 ends at 65,504. In a trained Stage C the stream of residuals x grows past that, which gives black pictures. So it
is held as x / s all the way, and what is added to it is computed as that fraction from the start:

    x                         the embedding, resamplers, residuals of ControlNets: divided by s
    what reads x              LayerNorms with eps / s², and depthwise convolutions as W·(x/s) + b/s before them: both
                              see what they always saw
    what is added to x        the last layer of a block as W·(h/s) + b/s; a timestep's scale as it is, its shift over s
    what is joined to x       skips stay divided; the layer that reads one gets the rest of its input divided as well

s is a power of two, so that each of these is exact: in float32 nothing changes. In fp16 neither does accuracy, because
the stream begins with a standard deviation of one and fp16 reaches as far below one (6e-8) as above; what is lost is
6e-8 · s, beside the rounding of 5e-4 that fp16 has anyway. It is the same for every network, so that nothing has to be
measured, no step repeated, and a picture depends on its seed alone.

No weight changes, nor any name in the state dict: the division happens where a weight is used, so that LoRA of any host
is right as it is. Each module that has to do with the stream has `stream_scale`, s, which is 1 unless `hold_stream` set
it; its norms have their eps. A program bound to the same modules has to do the same or leave such a network alone.

What is not divided has its own bounds: hidden values are products with a normed input, attention and the response norm
sum in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..errors import CascadeError

if TYPE_CHECKING:
    from .unet import UNet

# fp16 then holds up to 67 million, and what is above 1 / 16 with all of its 11 bits.
STREAM_SCALE = 1024.0

_AFFINE = (F.linear, torch.conv2d, torch.conv_transpose2d)  # each as (x, weight, bias, …)


def hold_stream(network: UNet, scale: float = STREAM_SCALE) -> None:
    """From now on Stage B or C holds its residual stream as x / scale, a power of two; 1 is as published."""
    before = network.stream_scale
    for module in network.modules():
        if hasattr(module, "stream_scale"):
            setattr(module, "stream_scale", scale)  # noqa: B010 (modules of several classes)
    for norm in network.stream_norms():
        norm.eps *= (before / scale) ** 2


def over(x: Tensor, scale: float) -> Tensor:
    """x / scale."""
    return x if scale == 1 else x * (1 / scale)


def scaled(layer: nn.Module, x: Tensor, scale: float) -> Tensor:
    """layer(scale · x) / scale without either product: the layer's bias is divided instead."""
    if scale == 1:
        return layer(x)
    with _BiasOver(scale) as mode:
        out = layer(x)
    if not mode.met:
        raise CascadeError(
            f"{type(layer).__name__} is not computed by PyTorch here, so that fp16 would overflow; switch "
            "that off (in ComfyUI: --fast cublas_ops), or choose dtype bf16 or fp32."
        )
    return out


class _BiasOver(TorchFunctionMode):
    """Divides the bias where a layer uses it, after all that a host has done to it: moved, cast, patched."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale
        self.met = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _AFFINE:
            x, weight, bias, *others = args
            self.met, args = True, (x, weight, over(bias, self.scale), *others)
        return func(*args, **(kwargs or {}))
