"""The backward pass of frozen depthwise convolutions: a convolution again, with the taps turned round.

Libraries look for an algorithm of their own for it, a slow one where it has to give the same bits each time.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FrozenDepthwise(torch.autograd.Function):
    """x (B, C, H, W) by one kernel (C, 1, k, k) for each channel, k odd, with as large a result. No other gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _convolve(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _convolve(grads[0], weight.flip(-1, -2), None), None, None


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))


def ready_depthwise(network: nn.Module) -> None:
    """From now on the network's frozen depthwise convolutions go back that way."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and _is_frozen_depthwise(layer):
            layer.forward = _forward(layer)  # type: ignore[method-assign]


def _is_frozen_depthwise(layer: nn.Conv2d) -> bool:
    side = layer.kernel_size[0]
    square = side % 2 == 1 and layer.kernel_size == (side, side)
    same_size = layer.padding == (side // 2,) * 2 and layer.stride == layer.dilation == (1, 1)
    frozen = not any(parameter.requires_grad for parameter in layer.parameters())
    return layer.groups == layer.in_channels == layer.out_channels > 1 and square and same_size and frozen


def _forward(layer: nn.Conv2d) -> Any:
    return lambda x: FrozenDepthwise.apply(x, layer.weight, layer.bias)
