"""One network's placement: its units, the patches of each, and who depends on the weights' addresses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..adapters.apply import Patch, Steps, apply_steps, changes_by_target, check_shape, parameter_of
from ..adapters.names import parameter_name
from ..checkpoints.pages import forget_pages
from ..networks.quantisation import QuantisedLayer, QuantisedWeight, quantise, quantised_layers
from .device import Device
from .loader import Loader, Transfer
from .plan import StreamingPlan
from .shared import RunBytes, SharedWorkspaces
from .stream import WeightStream
from .units import UNIT_BYTES, Unit, split_into_units


class WeightConsumer:
    """Base of classes that hold values depending on the addresses of a network's weights: bound views, copies, CUDA
    graphs.

    placement: that of its network; None until the consumer is passed to a run of `DeviceMemory`.
    """

    placement: Placement | None = None

    def offload(self) -> None:
        """Frees values that weights leaving the device make invalid, or not worth their memory; called before."""
        raise NotImplementedError

    def graph_bytes(self, device: torch.device) -> int:
        """Bytes on the device that this consumer's CUDA graphs keep, but for what is shared."""
        return 0

    def cache_bytes(self, device: torch.device) -> int:
        """Bytes on the device of other values that go with `offload`."""
        return 0

    def shared_workspace(self) -> Tensor | None:
        """Memory of its CUDA graphs that other networks of the device use in turn."""
        return None

    def known_bytes(self, shape: Sequence[int]) -> RunBytes | None:
        """What it is known to take for x of this shape beside the weights; None where that is not known."""
        return None


class WeightChange(Protocol):
    """The change of one weight by patches."""

    def apply(self, weight: Tensor) -> Tensor:
        """The changed weight, of the same shape, in any dtype. It may overwrite `weight`, but only with the result."""
        ...


class LayerChange(NamedTuple):
    """The steps of this package's own patches."""

    steps: Steps

    def apply(self, weight: Tensor) -> Tensor:
        return apply_steps(weight, self.steps)


UnitChanges = Mapping[int, WeightChange]  # by the weight's index in its unit
Changes = Mapping[Unit, UnitChanges]


class Placement:
    """A network's units on one device. Refers to the network's blocks, not to the network, so that an unused network
    is freed.

    order      the units that can be streamed, in the order of a forward; one whose level repeats occurs several times
    locations  unit and index of each parameter and buffer, by name
    quantised  the layer of each 8-bit weight, by unit and index, and its scale's index there
    changes    changes of the units' weights on the device by patches; in main memory, weights stay unpatched
    version    number of times that `changes` was replaced, so that values derived from weights can be told stale
    stream     prefetches the streamed units during a run; None between runs, and where all units are resident
    last_run   the number of the last run that used the network
    shared     where its CUDA graphs may take their memory; None: each engine has its own
    consumers  who is told before units leave the device
    """

    def __init__(
        self,
        network: nn.Module,
        device: Device,
        loader: Loader,
        unit_bytes: int = UNIT_BYTES,
        shared: SharedWorkspaces | None = None,
    ):
        self.device, self.loader, self.shared = device, loader, shared
        self.units, self.order = split_into_units(network, unit_bytes)
        indices = {id(tensor): (unit, i) for unit in self.units for i, tensor in enumerate(unit.tensors)}
        tensors = (*network.named_parameters(remove_duplicate=False), *network.named_buffers())
        self.locations = {name: indices[id(tensor)] for name, tensor in tensors}
        self.quantised: dict[tuple[Unit, int], tuple[QuantisedLayer, int]] = {}
        for name, layer in quantised_layers(network):
            (unit, index), (_, scale) = (
                self.locations[f"{name}.{part}"] for part in ("weight", "weight_scale")
            )
            self.quantised[unit, index] = (layer, scale)
        self.changes: Changes = {}
        self.version = 0
        self._keys: Mapping[Unit, Any] = {}
        self.in_use = False
        self.stream: WeightStream | None = None
        self.last_run = 0
        self.consumers: WeakSet[WeightConsumer] = WeakSet()

    @property
    def resident(self) -> list[Unit]:
        """The units that are on the device."""
        return [unit for unit in self.units if unit.device_buffer is not None]

    @property
    def reserved(self) -> list[Unit]:
        """The units for which memory is kept on the device, whether they are there or not."""
        return [unit for unit in self.units if unit.reserved_buffer is not None]

    @property
    def resident_bytes(self) -> int:
        """Bytes on the device that the resident units take."""
        return self.footprint(self.resident)

    def footprint(self, units: Iterable[Unit]) -> int:
        """Bytes that these units take on the device."""
        return sum(self.device.footprint(unit.size) for unit in units)

    def slot_bytes(self, plan: StreamingPlan) -> int:
        """Bytes on the device that a plan's slots take."""
        return plan.slots * self.device.footprint(plan.slot_bytes)

    def graph_bytes(self, device: torch.device) -> int:
        """Bytes on the device that CUDA graphs of the network keep."""
        return sum(consumer.graph_bytes(device) for consumer in self.consumers)

    def cache_bytes(self, device: torch.device) -> int:
        """Bytes on the device of other values that were made from the network."""
        return sum(consumer.cache_bytes(device) for consumer in self.consumers)

    def shared_workspaces(self) -> list[Tensor]:
        """Memory of the network's CUDA graphs that other networks use in turn, each once."""
        workspaces = [consumer.shared_workspace() for consumer in self.consumers]
        return list({id(memory): memory for memory in workspaces if memory is not None}.values())

    def changes_by(self, network: nn.Module, patches: Sequence[Patch]) -> Changes:
        """The changes by patches, by unit. Raises CascadeError for a patch that does not fit."""
        changes: dict[Unit, dict[int, LayerChange]] = {}
        for target, steps in changes_by_target(patches).items():
            _, _, parameter = parameter_of(network, target, steps[0][0])
            check_shape(parameter.shape, target, steps)
            unit, index = self.locations[parameter_name(target)]
            changes.setdefault(unit, {})[index] = LayerChange(steps)
        return changes

    def set_changes(self, changes: Changes, keys: Mapping[Unit, Any]) -> None:
        """Sets the changes of all units onloaded from now on. keys: by unit, equal for equal changes."""
        if keys != self._keys:
            self.version += 1
            for unit in self.units:
                if keys.get(unit) != self._keys.get(unit):
                    unit.changed = {}
        self.changes, self._keys = changes, keys

    def offload(self, units: Sequence[Unit]) -> None:
        """Takes units off the device and frees their memory, after all consumers have been told."""
        if units:
            self.tell_consumers()
        for unit in units:
            unit.offload()
            unit.reserved_buffer, unit.evicted = None, False

    def tell_consumers(self) -> None:
        """Makes consumers free values that depend on the weights' addresses."""
        for consumer in list(self.consumers):
            consumer.offload()

    def onload(self, units: Sequence[Unit]) -> None:
        """Copies units to the device that are not there, or not with these `changes`. Later computation waits."""
        buffers: list[tuple[Unit, Tensor]] = []
        for unit in units:
            if unit.device_buffer is None or unit.patch_key != self._keys.get(unit):
                buffer = (
                    self.device.empty(unit.size) if unit.reserved_buffer is None else unit.reserved_buffer
                )
                buffers.append((unit, buffer))
        for unit, _ in buffers:
            unit.offload()  # in main memory until the copy is complete
        after = self.device.record_event()  # freed memory may still be in use until then
        transfers: list[Transfer] = []
        try:
            for unit, buffer in buffers:
                transfers.append(self.loader.fetch(unit, buffer[: unit.size], after, repeated=False))
            for transfer in transfers:
                transfer.wait()
            for (unit, buffer), transfer in zip(buffers, transfers, strict=True):
                weights = unit.views(buffer)
                self.patch(unit, weights, transfer.changed)
                unit.reserved_buffer, unit.device_buffer = buffer, buffer[: unit.size]
                unit.point_to(weights)  # only after a complete copy
                unit.patch_key = self._keys.get(unit)
        except BaseException:
            for transfer in transfers:  # no copy may write to memory that has been freed
                with suppress(Exception):
                    transfer.wait()
            # Nor is any kept for what is not there.
            self.offload([unit for unit, _ in buffers if unit.device_buffer is None])
            raise

    def new_stream(self, plan: StreamingPlan, memory: Tensor | None = None) -> WeightStream:
        """A stream of the plan's units, with its slots, for runs while `stream` is set to it. memory: for the slots"""
        eight_bit = {
            (unit, i) for (unit, index), (_, scale) in self.quantised.items() for i in (index, scale)
        }
        dtypes = {
            layout.dtype
            for unit in self.units
            for i, layout in enumerate(unit.layouts)
            if layout.dtype.is_floating_point
            and (unit, i) not in eight_bit  # 8-bit weights are read in any dtype of x
        }
        return WeightStream(self.device, self.loader, self.order, plan, self.patch, dtypes, memory)

    @torch.inference_mode()
    def patch(self, unit: Unit, weights: Sequence[Tensor], brought: Mapping[int, Tensor]) -> None:
        """Applies the changes to a unit's weights in place, except those that were copied already changed."""
        for index, values in brought.items():
            if unit.changed.get(index) is not values:  # patches have changed since the fetch
                weights[index].copy_(unit.host_tensors[index], non_blocking=True)
        for index, change in self.changes.get(unit, {}).items():
            if (unit, index) not in self.quantised:
                weights[index].copy_(change.apply(weights[index]))
                continue
            if index in brought and brought[index] is unit.changed.get(index):
                continue
            for part, values in self.patched(unit, index, weights[index].device).items():
                weights[part].copy_(values, non_blocking=True)

    def patched(self, unit: Unit, index: int, device: torch.device) -> dict[int, Tensor]:
        """{index in the unit: tensor} of a weight with its changes, computed on the device from main memory; for an
        8-bit weight, its scales too.
        """
        if index in unit.changed:
            parts = (index, self.quantised[unit, index][1])
            return {part: unit.layouts[part].alone(unit.changed[part]) for part in parts}
        change, weight = self.changes[unit][index], unit.host_tensors[index]
        if (unit, index) not in self.quantised:
            return {index: change.apply(weight.to(device))}
        layer, scale = self.quantised[unit, index]
        weight8, rows = self._requantised(unit, index, layer, change, device)
        return {index: weight8.view(weight.shape), scale: rows[:, None]}

    def _requantised(
        self, unit: Unit, index: int, layer: QuantisedLayer, change: WeightChange, device: torch.device
    ) -> QuantisedWeight:
        """A changed 8-bit weight, computed from its original in float32 and rounded once.

        If the unit is streamed, the result is kept in main memory for the next forward.
        """
        scale = self.quantised[unit, index][1]
        stored = QuantisedWeight(unit.host_tensors[index], unit.host_tensors[scale][:, 0])
        original = layer.original_values(device, stored)
        forget_pages([t for t in [layer.original] if isinstance(t, Tensor)], self.loader.mapped_files)
        computed = quantise(change.apply(original), layer.weight.dtype)
        if self.stream is not None and unit in self.stream.plan.streamed:
            self._keep(unit, index, computed.weight8.view(unit.layouts[index].shape))
            self._keep(unit, scale, computed.scale[:, None])
        return computed

    def _keep(self, unit: Unit, index: int, values: Tensor) -> None:
        """Keeps a changed tensor in main memory, to be copied with its unit from now on."""
        layout = unit.layouts[index]
        memory = self.device.pinned(layout.size)
        memory = torch.empty(layout.size, dtype=torch.uint8) if memory is None else memory
        layout.alone(memory).copy_(values)
        unit.changed[index] = memory
