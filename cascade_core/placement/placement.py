"""A network as its units, and what patches change of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple
from weakref import WeakMethod

import torch
from torch import Tensor, nn

from ..adapters.apply import Patch, Steps, changes_by_layer, check_fit, layer_of, stepped
from .stream import Stream
from .units import Unit, cut


class Change(NamedTuple):
    """What patches do to one layer's weight."""

    layer: nn.Module
    steps: Steps


Changes = Mapping[Unit, Mapping[int, Change]]  # by the weight's place in its unit


class Placed:
    """A network's units. Holds its blocks and not itself: when its users let it go, its memory is free."""

    def __init__(self, network: nn.Module, unit_bytes: int):
        self.units, self.order = cut(network, unit_bytes)
        places = {id(tensor): (unit, i) for unit in self.units for i, tensor in enumerate(unit.tensors)}
        self.weights: dict[nn.Module, tuple[Unit, int]] = {}
        for layer in network.children():
            for module in layer.modules():
                if isinstance(module._parameters.get("weight"), nn.Parameter):
                    self.weights[module] = places[id(module.weight)]
        self.in_use = False
        self.stream: Stream | None = None  # while it is in use
        self.run = 0  # the last one that used it
        self.leaving: set[WeakMethod[Callable[[], object]]] = set()

    @property
    def there(self) -> list[Unit]:
        """The units that lie on the device."""
        return [unit for unit in self.units if unit.slab is not None]

    def leave(self, units: Sequence[Unit]) -> None:
        """Takes units off the device."""
        if units:
            for leaving in self.leaving:
                if (callback := leaving()) is not None:
                    callback()
        for unit in units:
            unit.leave()

    def changes(self, network: nn.Module, patches: Sequence[Patch]) -> Changes:
        """What patches change, by unit. Raises CascadeError for one that does not fit."""
        changes: dict[Unit, dict[int, Change]] = {}
        for name, steps in changes_by_layer(patches).items():
            layer, weight = layer_of(network, name, steps[0][0])
            check_fit(weight.shape, name, steps)
            unit, place = self.weights[layer]
            changes.setdefault(unit, {})[place] = Change(layer, steps)
        return changes


def stand_in(unit: Unit, changes: Mapping[int, Change] | None) -> None:
    """Gives each layer that is going to be changed a parameter of its own for it."""
    for place, change in (changes or {}).items():
        unit.stand_in(place, change.layer)


@torch.inference_mode()
def patch_unit(weights: Sequence[Tensor], changes: Mapping[int, Change] | None) -> None:
    """Changes a unit's weights where they lie, computed in float32 from the ones there, as `patched` does."""
    for place, change in (changes or {}).items():
        weights[place].copy_(stepped(weights[place], change.steps))
