# pyright: reportMissingImports=false
"""Placement of a MODEL's weights within the bytes that ComfyUI's memory manager gives them."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

import comfy.model_management
import torch
from torch import Tensor

from ....cascade_core.checkpoints.pages import mapped_files
from ....cascade_core.placement import CudaDevice, Device, Loader, Placement, Unit, out_of_memory
from ....cascade_core.placement.plan import SLOTS, StreamingPlan, plan_streaming
from ....cascade_core.placement.stream import WeightStream
from ....cascade_core.placement.units import UNIT_BYTES
from .weight_patches import Patches, UnitPatches, by_unit, keys_of, unchanged_kept

if TYPE_CHECKING:
    from .model import HostedNetwork

SMALLER_PLANS = 2  # number of smaller plans tried after one that ran out of memory


class Residence:
    """Units of one network on one device: resident, or streamed through slots while it runs.

    It belongs to the BaseModel, which all of ComfyUI's patchers of a MODEL share, since any of them may be told to
    free the weights.

    load_device  the device, in the host's terms
    patches      of the weights on the device, except those of hooks
    """

    def __init__(
        self,
        network: HostedNetwork,
        load_device: torch.device,
        device: Device,
        loader: Loader | None = None,
        unit_bytes: int = UNIT_BYTES,
    ):
        self.load_device, self.device = load_device, device
        self.placement = Placement(network.network, device, loader or Loader(device), unit_bytes)
        self.placement.loader.mapped_files = mapped_files()
        self.placement.consumers.add(network.engine)
        network.engine.placement = self.placement
        self.patches: Patches = {}
        self._hooked = self._host_patched = False
        self._patched: UnitPatches = {}
        self._plan: StreamingPlan | None = None
        self._stream: WeightStream | None = None

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of the network gets no residence: its weights lie where they were copied to."""
        return

    @property
    def bytes(self) -> int:
        """Bytes on the device: resident units, slots, and the factors of patches kept there."""
        slots = 0 if self._stream is None else self.placement.slot_bytes(self._stream.plan)
        factors = sum(weight.device_bytes for each in self._patched.values() for weight in each.values())
        return self.placement.resident_bytes + slots + factors

    @property
    def graph_bytes(self) -> int:
        """Bytes on the device of the network's CUDA graphs."""
        return self.placement.graph_bytes(self.device.device)

    @property
    def streamed(self) -> list[Unit]:
        """The units that are not on the device."""
        return [unit for unit in self.placement.units if unit.device_buffer is None]

    @property
    def streamed_patches(self) -> int:
        """Number of weights that are patched each time they are copied to the device."""
        return sum(len(self._patched.get(unit, ())) for unit in self.streamed)

    def host_tensor(self, name: str) -> Tensor | None:
        """A weight in main memory, unpatched, by its name in the network."""
        location = self.placement.locations.get(name)
        return None if location is None else location[0].host_tensors[location[1]]

    @torch.inference_mode()
    def place(self, room: float, patches: Patches) -> None:
        """Copies as much of the patched network to the device as fits into `room` bytes; the rest will be streamed.

        Raises torch.OutOfMemoryError where even the smallest plan does not fit.
        """
        self._undo_host_patches()
        self.patches, self._hooked = patches, False
        patched = by_unit(self.placement, patches)
        plan = self._choose(room, patched)
        for attempt in range(SMALLER_PLANS + 1):
            try:
                self._apply(plan, patched)
                return
            except Exception as error:
                if not out_of_memory(error) or attempt == SMALLER_PLANS:
                    raise
            # The frames that refer to the memory are gone only after the except block.
            self._stream = self._plan = None
            self.device.trim()
            plan = self._smaller(plan)

    @torch.inference_mode()
    def shrink(self, size: int) -> int:
        """Frees about `size` bytes: first the memory of graphs, then whole units. Returns how many were freed."""
        before = self.bytes + self.graph_bytes
        self.close()
        self.placement.tell_consumers()
        left = before - size
        if self.bytes > left:
            self._stream = self._plan = None
            self.placement.offload(self._leaving(self.bytes - left, self._plan_for(left)))
        self.device.trim()
        return before - self.bytes - self.graph_bytes

    @torch.inference_mode()
    def release(self) -> None:
        """Frees everything on the device; all weights are then in main memory, unpatched."""
        self.close()
        self._undo_host_patches()
        self._stream = self._plan = None
        self.placement.tell_consumers()
        self.placement.offload(self.placement.resident)
        self.patches, self._hooked = {}, False
        self._set_patched({})
        self.device.trim()

    @torch.inference_mode()
    def hook(self, patches: Patches) -> None:
        """Adds patches to those of `place` for all following forwards. {}: none."""
        if not patches and not self._hooked:
            return
        self._hooked = bool(patches)
        added = {key: [*self.patches.get(key, ()), *steps] for key, steps in patches.items()}
        self._set_patched(by_unit(self.placement, {**self.patches, **added}))
        self.placement.onload(self.placement.resident)

    @torch.inference_mode()
    def open(self) -> None:
        """Makes the network ready to run: units that are not on the device are streamed until `close`."""
        if self.placement.stream is not None or not (missing := self.streamed):
            return
        self._undo_host_patches()
        blocks = frozenset(missing) & frozenset(self.placement.order)
        if self._stream is None or self._stream.plan.streamed != frozenset(missing):
            # No load was requested since weights were freed.
            largest = max((unit.size for unit in blocks), default=0)
            self._apply(StreamingPlan(blocks, min(SLOTS, len(blocks)), largest), self._patched)
        if self._stream is not None:
            self.placement.stream = self._stream
            self._stream.open()

    def close(self) -> None:
        """Ends streaming: streamed weights are in main memory again. The slots stay."""
        stream, self.placement.stream = self.placement.stream, None
        if stream is not None:
            stream.close()

    @torch.inference_mode()
    def patch_host(self) -> None:
        """Patches copies of streamed weights in main memory, for code that reads parameters directly."""
        self.close()
        for unit in self.streamed:
            for index in self._patched.get(unit, ()):
                for part, values in self.placement.patched(unit, index, self.device.device).items():
                    unit.tensors[part].data = values.to(unit.host_tensors[part].device)
                self._host_patched = True

    def _undo_host_patches(self) -> None:
        self.close()
        if self._host_patched:
            for unit in self.streamed:
                unit.offload()
            self._host_patched = False

    def _choose(self, room: float, patched: UnitPatches) -> StreamingPlan:
        """The plan for `room` bytes; keeps the present one unless another is much better."""
        plan = self._plan_for(room)
        if plan.streamed:  # then the slots share the memory with the factors of patches
            factors = (
                weight.factor_bytes
                for unit in plan.streamed
                for index, weight in patched.get(unit, {}).items()
                if (unit, index) not in self.placement.quantised
            )
            plan = self._plan_for(room - sum(factors))
        present = self._plan
        if present is None or not plan.streamed or self._bytes(present) > room:
            return plan
        gain = sum(unit.size for unit in present.streamed) - sum(unit.size for unit in plan.streamed)
        return present if gain < 2 * plan.slot_bytes else plan

    def _leaving(self, size: int, plan: StreamingPlan) -> list[Unit]:
        """Resident units of `size` bytes or more in all: those that the plan streams first, then others, last first."""
        resident = [*reversed(self.placement.resident)]
        leaving: list[Unit] = []
        for unit in sorted(resident, key=lambda unit: unit not in plan.streamed):
            if size <= 0:
                break
            leaving.append(unit)
            size -= self.device.footprint(unit.size)
        return leaving

    def _plan_for(self, room: float) -> StreamingPlan:
        return plan_streaming(self.placement.units, self.placement.order, room, self.device.footprint)

    def _smaller(self, plan: StreamingPlan) -> StreamingPlan:
        """A plan that keeps half as many bytes on the device."""
        return self._plan_for(self._bytes(plan) // 2)

    def _bytes(self, plan: StreamingPlan) -> int:
        resident = [unit for unit in self.placement.units if unit not in plan.streamed]
        return self.placement.footprint(resident) + self.placement.slot_bytes(plan)

    def _apply(self, plan: StreamingPlan, patched: UnitPatches) -> None:
        leaving = [unit for unit in self.placement.resident if unit in plan.streamed]
        self.placement.offload(leaving)
        if self._stream is not None and self._stream.plan != plan:
            self._stream = None
        self._plan = plan
        if leaving:
            self.device.trim()
        self._set_patched(patched)
        self.placement.onload([unit for unit in self.placement.units if unit not in plan.streamed])
        if plan.streamed and self._stream is None:
            self._stream = self.placement.new_stream(plan)

    def _set_patched(self, patched: UnitPatches) -> None:
        """Sets the patches of weights from now on. Unchanged patches keep their factors on the device."""
        self._patched = unchanged_kept(self._patched, patched)
        self.placement.set_changes(self._patched, keys_of(self._patched))
        if self._plan is None:
            return
        for unit, weights in self._patched.items():
            for index, weight in weights.items():
                # 8-bit weights are patched only once as well, and then kept in main memory.
                if unit in self._plan.streamed and (unit, index) not in self.placement.quantised:
                    weight.keep_on(self.device.device)
                else:
                    weight.drop()  # patched only once, when the unit is copied to the device


class HostCard(CudaDevice):
    """A card whose pinned memory is registered with the host, in versions that count it (0.33.0)."""

    def _pin(self, address: int, size: int) -> bool:
        pin = getattr(comfy.model_management, "pin_memory", None)
        if pin is None:
            return super()._pin(address, size)
        management = comfy.model_management
        if management.TOTAL_PINNED_MEMORY + size > management.MAX_PINNED_MEMORY:
            return False  # pinning would exceed the host's own limit
        return bool(pin(_memory_at(address, size)))

    def _unpin(self, address: int) -> None:
        unpin = getattr(comfy.model_management, "unpin_memory", None)
        size = getattr(comfy.model_management, "PINNED_MEMORY", {}).get(address)
        if unpin is None or size is None:
            super()._unpin(address)
            return
        with suppress(Exception):  # when the process ends the device may be gone
            torch.cuda.synchronize(self.device)  # no copy may read memory while it is unpinned
            unpin(_memory_at(address, size))


def _memory_at(address: int, size: int) -> Tensor:
    """Memory at an address as a tensor that does not own it."""
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)


@cache
def card_loader(load_device: torch.device) -> Loader:
    """The loader of a card; all networks share its few pinned chunks."""
    return Loader(HostCard(load_device))
