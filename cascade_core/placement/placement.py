"""One network's placement: its units, the patches of each, and who depends on the weights' addresses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..adapters.apply import Patch, Steps, apply_steps, changes_by_layer, check_shape, layer_of
from .stream import WeightStream
from .units import UNIT_BYTES, Unit, split_into_units


class WeightConsumer:
    """Base of what keeps values that depend on where a network's weights are: bound views, copies, CUDA graphs.

    placement: of its network, since a run of `DeviceMemory` was given this consumer; None before.
    """

    placement: Placement | None = None

    def offload(self) -> None:
        """Free what becomes invalid, or is not worth its memory, when weights leave the device: called before."""
        raise NotImplementedError

    def graph_bytes(self, device: torch.device) -> int:
        """Bytes on the device that this consumer's CUDA graphs keep."""
        return 0


class LayerChange(NamedTuple):
    """What patches do to one layer's weight."""

    layer: nn.Module
    steps: Steps


UnitChanges = Mapping[int, LayerChange]  # by the weight's index in its unit
Changes = Mapping[Unit, UnitChanges]


class Placement:
    """A network's units. Refers to its blocks, not to the network: when its users drop that, its memory is free.

    order      the units that can be streamed, as a forward runs them; one whose level repeats stands several times
    stream     prefetches the streamed units during a run; None between runs, and where all units are resident
    last_run   the number of the last run that used the network
    consumers  who is told before units leave the device
    """

    def __init__(self, network: nn.Module, unit_bytes: int = UNIT_BYTES):
        self.units, self.order = split_into_units(network, unit_bytes)
        indices = {id(tensor): (unit, i) for unit in self.units for i, tensor in enumerate(unit.tensors)}
        self._weights: dict[nn.Module, tuple[Unit, int]] = {}
        for child in network.children():
            for layer in child.modules():
                if isinstance(layer._parameters.get("weight"), nn.Parameter):
                    self._weights[layer] = indices[id(layer.weight)]
        self.in_use = False
        self.stream: WeightStream | None = None
        self.last_run = 0
        self.consumers: WeakSet[WeightConsumer] = WeakSet()

    @property
    def resident(self) -> list[Unit]:
        """The units that are on the device."""
        return [unit for unit in self.units if unit.device_buffer is not None]

    def graph_bytes(self, device: torch.device) -> int:
        """Bytes on the device that CUDA graphs of the network keep."""
        return sum(consumer.graph_bytes(device) for consumer in self.consumers)

    def offload(self, units: Sequence[Unit]) -> None:
        """Takes units off the device, after all consumers have been told."""
        if units:
            for consumer in list(self.consumers):
                consumer.offload()
        for unit in units:
            unit.offload()

    def changes(self, network: nn.Module, patches: Sequence[Patch]) -> Changes:
        """What patches change, by unit. Raises CascadeError for one that does not fit."""
        changes: dict[Unit, dict[int, LayerChange]] = {}
        for name, steps in changes_by_layer(patches).items():
            layer, weight = layer_of(network, name, steps[0][0])
            check_shape(weight.shape, name, steps)
            unit, index = self._weights[layer]
            changes.setdefault(unit, {})[index] = LayerChange(layer, steps)
        return changes


def swap_parameters(unit: Unit, changes: UnitChanges | None) -> None:
    """Gives each layer that is going to be changed a new parameter."""
    for index, change in (changes or {}).items():
        unit.swap_parameter(index, change.layer)


@torch.inference_mode()
def patch_unit(weights: Sequence[Tensor], changes: UnitChanges | None) -> None:
    """Patches a unit's weights in place, computed in float32 as `patched` does."""
    for index, change in (changes or {}).items():
        weights[index].copy_(apply_steps(weights[index], change.steps))
