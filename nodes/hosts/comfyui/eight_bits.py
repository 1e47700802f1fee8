# pyright: reportMissingImports=false
"""8-bit weights of a MODEL: patched and merged in their original precision, saved with their scales.

To ComfyUI a weight is one tensor with a name. For an 8-bit layer that tensor is only one half of the weight, and its
scales are the other: this module does to both what ComfyUI would do to the one.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ....cascade_core.checkpoints.quantised import quantised_layout, written_layout
from ....cascade_core.networks.quantisation import (
    INT8,
    QuantisedConv2d,
    QuantisedLayer,
    QuantisedLinear,
    QuantisedWeight,
    quantise,
    quantised_layers,
)
from .weight_patches import PREFIX, PatchedWeight

if TYPE_CHECKING:
    from .model import HostedNetwork

Halves = tuple[nn.Parameter, Tensor]  # weight and weight_scale of a layer


class WrappedLayer(QuantisedLayer):
    """An 8-bit layer that applies the functions which nodes wrap around weights (`add_weight_wrapper`)."""

    weight_function: list[Callable[[Tensor], Tensor]]
    bias_function: list[Callable[[Tensor], Tensor]]

    def values_for(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        weight, bias = super().values_for(x)
        for function in self.weight_function:
            weight = function(weight)
        if bias is not None:
            for function in self.bias_function:
                bias = function(bias)
        return weight, bias


class WrappedLinear(WrappedLayer, QuantisedLinear):
    """Linear with an 8-bit weight."""


class WrappedConv2d(WrappedLayer, QuantisedConv2d):
    """1×1 convolution with an 8-bit weight."""


class EightBitWeights:
    """The 8-bit weights of a BaseModel, which all its patchers share. layers: by the names of their weights in it

    A `Residence` that moves the weights patches them too; without one, `patch` and `hook` do.
    """

    def __init__(self, hosted: HostedNetwork):
        self._hosted = hosted
        layers = quantised_layers(hosted.network)
        self.layers: dict[str, Any] = {f"{PREFIX}{name}.weight": layer for name, layer in layers}
        for layer in self.layers.values():
            layer.__class__ = WrappedConv2d if issubclass(type(layer), nn.Conv2d) else WrappedLinear
        self.unwrap()
        self.steps: dict[str, Sequence[tuple]] = {}  # patches of the weights changed by `patch`
        self._unpatched: dict[str, Halves] = {}
        self._unhooked: dict[str, Halves] = {}

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales, which are not in the state dict."""
        return sum(layer.weight_scale.nbytes for layer in self.layers.values())

    def holds(self, key: str) -> bool:
        """Whether a weight or bias belongs to an 8-bit layer."""
        return f"{key.rpartition('.')[0]}.weight" in self.layers

    def unwrap(self) -> None:
        """Removes the functions that nodes wrapped around the weights."""
        for layer in self.layers.values():
            layer.weight_function, layer.bias_function = [], []

    def unpatched(self, key: str) -> QuantisedWeight:
        """A weight in 8 bits as it was loaded."""
        name, residence, layer = key.removeprefix(PREFIX), self._hosted.residence, self.layers[key]
        if residence is not None:
            weight, scale = residence.host_tensor(name), residence.host_tensor(f"{name}_scale")
            if weight is not None and scale is not None:
                return QuantisedWeight(weight, scale[:, 0])
        halves = self._unpatched.get(key) or self._unhooked.get(key) or (layer.weight, layer.weight_scale)
        return QuantisedWeight(halves[0].detach(), halves[1][:, 0])

    def original(self, key: str) -> tuple[Tensor, Callable[..., Tensor]]:
        """(tensor, function that computes its values after a cast), as returned by `get_key_patches`."""
        source = self.layers[key].original
        if isinstance(source, Tensor):
            return source, lambda values, **_: values
        weight8, scale = source or self.unpatched(key)
        return weight8.view(self.layers[key].weight.shape), partial(_scaled, scale)

    @torch.inference_mode()
    def values(self, key: str, steps: Sequence[tuple], device: torch.device | None = None) -> Tensor:
        """A weight with patches, from its original, in float32."""
        layer = self.layers[key]
        original = layer.original_values(device, self.unpatched(key))
        return PatchedWeight(key, steps, layer.weight).apply(original) if steps else original

    def patch(self, key: str, steps: Sequence[tuple], device: torch.device | None = None) -> None:
        """Patches a weight in place, computed on `device` (None: the weight's own)."""
        layer = self.layers[key]
        self._unpatched.setdefault(key, (layer.weight, layer.weight_scale))
        self._put(key, steps, device)
        self.steps[key] = steps

    def unpatch(self) -> None:
        """Restores all weights to the very tensors that were loaded."""
        self.unhook()
        for key, halves in self._unpatched.items():
            self._restore(key, halves)
        self._unpatched, self.steps = {}, {}

    def hook(self, patches: Mapping[str, Sequence[tuple]]) -> None:
        """Adds patches to those of `patch`; replaces those of the previous call."""
        self.unhook()
        for key in patches.keys() & self.layers.keys():
            layer = self.layers[key]
            self._unhooked[key] = layer.weight, layer.weight_scale
            self._put(key, [*self.steps.get(key, ()), *patches[key]], layer.weight.device)

    def unhook(self) -> None:
        """Removes the patches that `hook` added."""
        for key, halves in self._unhooked.items():
            self._restore(key, halves)
        self._unhooked = {}

    @torch.inference_mode()
    def _put(self, key: str, steps: Sequence[tuple], device: torch.device | None) -> None:
        layer = self.layers[key]
        layer.put(quantise(self.values(key, steps, device), layer.weight.dtype))

    def _restore(self, key: str, halves: Halves) -> None:
        self.layers[key].weight, self.layers[key].weight_scale = halves

    @torch.inference_mode()
    def file_tensors(self) -> dict[str, Tensor]:
        """The weights under their names in the network, in the form of files, with all patches except those of hooks.

        Weights of convolutions, which ComfyUI's own loaders cannot read in 8 bits, get the precision of the other
        weights.
        """
        residence = self._hosted.residence
        steps, device = self.steps, None
        if residence is not None and self.layers:
            residence.patch_host()
            steps, device = residence.patches, residence.device.device
        tensors: dict[str, Tensor] = {}
        for key, layer in self.layers.items():
            name, patches = key.removeprefix(PREFIX), steps.get(key, ())
            scale = layer.weight_scale
            if isinstance(layer, nn.Conv2d):
                parts = {name: self.values(key, patches, device).to(self._hosted.dtype)}
            elif layer.weight.dtype == INT8 or (not patches and bool((scale == scale[0]).all())):
                parts = quantised_layout(name, layer.quantised, layer.weight.shape)
            else:
                parts = written_layout(name, self.values(key, patches, device), layer.weight.dtype)
            tensors |= {part: tensor.cpu() for part, tensor in parts.items()}
        return tensors


class FloatState(dict[str, Tensor]):
    """A state dict in which the tensors of these `keys` are replaced by `values_of` them, computed at each access."""

    def __init__(
        self, tensors: Mapping[str, Tensor], keys: Container[str], values_of: Callable[[str], Tensor]
    ):
        super().__init__(tensors)
        self._keys, self._values_of = keys, values_of

    def __getitem__(self, key: str) -> Tensor:
        return self._values_of(key) if key in self._keys else super().__getitem__(key)

    def items(self) -> Any:
        return ((key, self[key]) for key in self)

    def values(self) -> Any:
        return (self[key] for key in self)


def _scaled(scale: Tensor, codes: Tensor, **_: Any) -> Tensor:
    """The values of an 8-bit weight that was cast to float."""
    return codes * scale.to(codes).view(-1, *[1] * (codes.ndim - 1))
