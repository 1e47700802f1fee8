"""Frozen networks with quantised weights, around which something is trained.

int8 uses the module of sampling (networks/quantisation.py): half the memory of 16 bits, on every device. nf4
(Dettmers et al. 2023, arXiv 2305.14314) takes a quarter, with bitsandbytes' kernels. Both kinds of weights are
dequantised for each product, and again for the gradient, so that no second copy is kept.
"""

import importlib
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..checkpoints import load_model
from ..errors import CascadeError
from ..networks.quantisation import INT8, FrozenProduct, QuantisedLayer, quantisable, quantised_layers


def load_frozen(path: str, kind: str, base: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Stage B or C with its large weights in `base`, all else in `dtype`, on the device."""
    check_base(base)
    if base == "int8":
        network, _, _ = load_model(path, kind, dtype, device, eight_bit=INT8, quantise_on=device)
        for _, layer in quantised_layers(network):
            layer.original = None  # unused here, since nothing is patched
    else:
        network, _, _ = load_model(path, kind, dtype)
        quantise_to_nf4(network, device)
    return network.to(device)


def check_base(base: str) -> None:
    """Raises CascadeError unless the package that quantises to this format is installed."""
    if base != "nf4":
        return
    try:
        importlib.import_module("bitsandbytes")
    except ImportError:
        raise CascadeError(
            "train.base_weights nf4 is bitsandbytes', which is not installed; run: pip install bitsandbytes, or choose "
            "int8."
        ) from None


class NF4Linear(nn.Linear):
    """Linear with a frozen weight in 4 bits, two in a byte. state: bitsandbytes' scales of its blocks"""

    state: Any

    def dequantised(self, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return cast(Tensor, dequantize_4bit(self.weight, self.state)).to(device, dtype)

    def values_for(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        bias = None if self.bias is None else self.bias.to(x)
        return self.dequantised(x.dtype), bias

    def forward(self, x: Tensor) -> Tensor:
        return FrozenProduct.of(x, self)


def quantise_to_nf4(network: nn.Module, device: torch.device) -> None:
    """Makes a network's large linear layers `NF4Linear`, one after the other, on the device."""
    for _, layer in quantisable(network):
        if isinstance(layer, nn.Linear):
            quantise_layer_to_nf4(layer, device)


@torch.no_grad()
def quantise_layer_to_nf4(layer: nn.Linear, device: torch.device) -> None:
    from bitsandbytes.functional import quantize_4bit

    weight = layer.weight.detach().to(device).contiguous()
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    layer.__class__, layer.weight = NF4Linear, nn.Parameter(packed, requires_grad=False)
    layer.__dict__["state"] = state


def float_weight(layer: Any) -> Tensor:
    """A layer's weight (rows, columns) in float32, dequantised where it is held in fewer bits."""
    if isinstance(layer, QuantisedLayer | NF4Linear):
        return layer.dequantised(torch.float32).flatten(1)
    return layer.weight.detach().flatten(1).float()


def parameter_count(network: nn.Module) -> int:
    """Number of weights of a network; a byte holds two of those in 4 bits."""
    return sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in network.parameters())
