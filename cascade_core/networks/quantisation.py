"""8-bit weights: e4m3 or int8 with a float32 scale for each row, in half the memory of bf16.

A row is an output channel's weights. Its scale maps its largest value to the largest of the format, so the rounding
error is at most 1/16 of a value or, near zero, 2⁻¹⁰ scales in e4m3, and half a scale in int8; for a product that is
about 2.7 % and 1 %.

Only the large matrices are quantised, those of attention and of the MLPs, with the mappers between repeats: 97 % of a
network's bytes. Timestep mappers, norms, biases, depthwise and resampling convolutions, input and output layers are
left alone.

A quantised layer computes by itself on any device: it dequantises its weight for each call, and again for a gradient,
so that a network can be trained around it. The engine reads the 8-bit weight instead. Patches are applied to
`original`, the file's own mapped values, so that a LoRA is computed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .layers import AttnBlock, FeedForwardBlock, ResBlock
from .unet import UNet

E4M3 = torch.float8_e4m3fn
INT8 = torch.int8
FORMATS = {"fp8": E4M3, "int8": INT8}  # by the dtypes that loaders offer
LARGEST = {E4M3: 448.0, torch.float8_e5m2: 57344.0, INT8: 127.0}
LEAST_SCALE = torch.finfo(torch.float32).tiny


class QuantisedWeight(NamedTuple):
    """weight8 · scale, row by row.  weight8: (out, K) in 8 bits, scale: (out,) float32"""

    weight8: Tensor
    scale: Tensor


def quantise(weight: Tensor, dtype: torch.dtype) -> QuantisedWeight:
    """A weight (out, …) with a scale for each row, rounded to the nearest."""
    rows = weight.detach().flatten(1).float()
    scale = rows.abs().amax(dim=1) / LARGEST[dtype]
    scale = torch.where(scale < LEAST_SCALE, 1.0, scale)  # NaN stays
    return QuantisedWeight(rounded(rows / scale[:, None], dtype), scale)


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values, which have to be within its range, rounded to the nearest of an 8-bit format; ties to even."""
    return (values.round() if dtype == INT8 else values).to(dtype)


def dequantise(quantised: QuantisedWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """(out, K), computed in float32 and rounded once. out: where to write it, of that dtype."""
    weight8, scale = quantised
    out = torch.empty(weight8.shape, dtype=dtype, device=weight8.device) if out is None else out
    # 8 bits are exact in all of these, and float8 does not promote.
    wide = weight8 if weight8.dtype == INT8 else weight8.to(dtype)
    return torch.mul(wide, scale[:, None], out=out)


class QuantisedLayer(nn.Module):
    """A layer whose weight is in 8 bits.

    weight        in its own shape
    weight_scale  (out, 1) float32; not in the state dict, where files and hosts look for the published names
    original      the weight before it was quantised, in main memory; None: the 8-bit weight itself
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_scale: Tensor
    original: Tensor | QuantisedWeight | None

    @property
    def quantised(self) -> QuantisedWeight:
        """The current weight, patched or not."""
        return QuantisedWeight(self.weight.detach().flatten(1), self.weight_scale[:, 0])

    def original_values(
        self, device: torch.device | None = None, unpatched: QuantisedWeight | None = None
    ) -> Tensor:
        """The unpatched weight in float32, on `device` (None: where it is).

        unpatched: the 8-bit weight without patches, if the layer's own may be patched
        """
        source = self.original if self.original is not None else unpatched or self.quantised
        if isinstance(source, QuantisedWeight):
            weight8, scale = (part.to(device) for part in source)
            return dequantise(QuantisedWeight(weight8.flatten(1), scale), torch.float32).view(
                self.weight.shape
            )
        return source.detach().to(device).float()

    def put(self, quantised: QuantisedWeight) -> None:
        """Replaces the weight."""
        weight8, scale = quantised
        self.weight = nn.Parameter(weight8.view(self.weight.shape), requires_grad=False)
        self.weight_scale = scale[:, None]

    def dequantised(self, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """The current weight in the layer's original shape, on `device` (None: where it is)."""
        moved = QuantisedWeight(*(part.to(device) for part in self.quantised))
        return dequantise(moved, dtype).view(self.weight.shape)

    def values_for(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(weight, bias) in the dtype and on the device of x."""
        bias = None if self.bias is None else self.bias.to(x)
        return self.dequantised(x.dtype, x.device), bias


class QuantisedLinear(QuantisedLayer, nn.Linear):
    """Linear with an 8-bit weight."""

    def forward(self, x: Tensor) -> Tensor:
        return FrozenProduct.of(x, self)


class QuantisedConv2d(QuantisedLayer, nn.Conv2d):
    """1×1 convolution with an 8-bit weight."""

    def forward(self, x: Tensor) -> Tensor:
        return FrozenProduct.of(x, self)


class FrozenProduct(torch.autograd.Function):
    """Product of a frozen layer, linear or a 1×1 convolution, that dequantises its weight for each call.

    The backward pass dequantises it again, where autograd would keep a copy in 16 bits.
    """

    @staticmethod
    def of(x: Tensor, layer: Any) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return FrozenProduct.apply(x, layer)  # type: ignore[return-value]
        return _product(layer)(x, *layer.values_for(x))

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        return _product(layer)(x, *layer.values_for(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        weight = ctx.layer.dequantised(gradients[0].dtype, gradients[0].device)
        turned = weight.transpose(0, 1)
        return _product(ctx.layer)(gradients[0], turned), None


def _product(layer: nn.Module) -> Callable[..., Tensor]:
    return F.linear if isinstance(layer, nn.Linear) else F.conv2d


def quantisable(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers of Stage B or C, with their names, that are quantised; of other networks none."""
    if not isinstance(network, UNet):
        return
    for name, block in network.named_modules():
        if isinstance(block, ResBlock | FeedForwardBlock):
            yield f"{name}.channelwise.0", block.channelwise[0]
            yield f"{name}.channelwise.4", block.channelwise[4]
        elif isinstance(block, AttnBlock):
            attention = block.attention.attn
            for part in ("to_q", "to_k", "to_v", "out_proj"):
                yield f"{name}.attention.attn.{part}", getattr(attention, part)
            yield f"{name}.kv_mapper.1", block.kv_mapper[1]
    for side in ("down_repeat_mappers", "up_repeat_mappers"):
        for name, mapper in getattr(network, side).named_modules(prefix=side):
            if isinstance(mapper, nn.Conv2d):
                yield name, mapper


def quantised_layers(network: nn.Module) -> Iterator[tuple[str, QuantisedLayer]]:
    """The layers, with their names, whose weights are in 8 bits."""
    return ((name, layer) for name, layer in network.named_modules() if isinstance(layer, QuantisedLayer))


def is_quantised(layer: nn.Module, name: str) -> bool:
    """Whether a layer's parameter of that name is in 8 bits."""
    return isinstance(layer, QuantisedLayer) and name == "weight"


def weight_format(network: nn.Module) -> torch.dtype | None:
    """The 8-bit format of a network's weights; None where they are not quantised."""
    return next((layer.weight.dtype for _, layer in quantised_layers(network)), None)


def quantise_network(
    network: Any,
    dtype: torch.dtype,
    stored: Mapping[str, QuantisedWeight] | None = None,
    device: torch.device | None = None,
) -> Any:
    """Makes a network's large weights 8-bit, in place.

    stored  weights that a file holds in 8 bits, by name: used as they are where their format is `dtype`; else they
            become the layers' `original`
    device  to quantise on, one weight at a time (None: where it is); the bits are the same
    """
    for name, layer in list(quantisable(network)):
        _quantise_layer(layer, dtype, (stored or {}).get(f"{name}.weight"), device)
    if device is not None and device.type == "cuda":
        torch.cuda.empty_cache()  # else the cache stays in pieces too small for anything larger
    return network


@torch.no_grad()
def _quantise_layer(
    layer: Any, dtype: torch.dtype, stored: QuantisedWeight | None, device: torch.device | None
) -> None:
    weight = layer.weight
    if stored is not None:
        stored = QuantisedWeight(stored.weight8.flatten(1), stored.scale)
    layer.__class__ = QuantisedConv2d if issubclass(type(layer), nn.Conv2d) else QuantisedLinear
    layer.original = weight.detach() if stored is None else stored
    if stored is not None and stored.weight8.dtype == dtype:
        layer.original, quantised = None, stored
    else:
        values = quantise(layer.original_values(device), dtype)
        home = weight.device if stored is None else stored.weight8.device
        quantised = QuantisedWeight(*(part.to(home) for part in values))
    weight8, scale = quantised
    layer.weight = nn.Parameter(weight8.view(weight.shape), requires_grad=False)
    layer.register_buffer("weight_scale", scale[:, None], persistent=False)
