"""Streams units through a few slots: the next unit is copied while the previous one computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from .device import Device
from .loader import Loader, Transfer
from .plan import StreamingPlan
from .units import Unit


class WeightStream:
    """Streams a plan's units during all forwards between `open` and `close`; the slots stay allocated after `close`.

    Hooks on the blocks report when a unit is needed and when it has been used; the engine, which does not call the
    blocks, reports it itself (`pre_forward`, `post_forward`). Units are prefetched in the order in which forwards need
    them, as far as there are free slots, from one forward into the next.

    onloaded(unit, weights, changed): called when a unit's weights are in their slot, before they are used, with those
    of its `changed` tensors that the copy included.
    dtypes: of the network's weights on the device, the resident ones' too.
    memory: of at least all slots' bytes, which nobody else uses until `close`; None: it is allocated.
    """

    def __init__(
        self,
        device: Device,
        loader: Loader,
        order: Sequence[Unit],
        plan: StreamingPlan,
        onloaded: Callable[[Unit, list[Tensor], Mapping[int, Tensor]], None],
        dtypes: Set[torch.dtype],
        memory: Tensor | None = None,
    ):
        self.device, self.loader, self.onloaded, self.dtypes = device, loader, onloaded, dtypes
        self.plan = plan
        self.order = [unit for unit in order if unit in plan.streamed]
        self.first_blocks = {unit.blocks[0]: unit for unit in self.order}
        self.last_blocks = {unit.blocks[-1]: unit for unit in self.order}
        if memory is None:
            self.slots = [device.empty(plan.slot_bytes) for _ in range(plan.slots)]
        else:
            self.slots = list(memory[: plan.slots * plan.slot_bytes].split(plan.slot_bytes))
        self.views: dict[tuple[Unit, int], list[Tensor]] = {}
        self.prefetched: deque[tuple[Unit, int, Transfer]] = deque()
        self.active: dict[Unit, int] = {}  # unit -> its slot, while its blocks run
        self.next = 0  # index in `order` of the unit that is fetched into the next free slot
        self.hooks: list[Any] = []
        begin = device.record_event()  # freed memory may still be in use until then
        self.free_slots: deque[tuple[int, Any]] = deque((slot, begin) for slot in range(plan.slots))

    def open(self) -> None:
        """Registers the hooks and begins to prefetch; after it the blocks can be run."""
        for block in self.first_blocks:
            self.hooks.append(block.register_forward_pre_hook(lambda block, *_: self.pre_forward(block)))
        for block in self.last_blocks:
            self.hooks.append(block.register_forward_hook(lambda block, *_: self.post_forward(block)))
        self._prefetch()

    def pre_forward(self, block: nn.Module) -> None:
        """Onloads the unit that begins with this block. Call it before the block is run."""
        if block in self.first_blocks:
            self._onload(self.first_blocks[block])

    def post_forward(self, block: nn.Module) -> None:
        """Frees the slot of the unit that ends with this block. Call it when the block's weights have been read."""
        if block in self.last_blocks:
            self._free_slot(self.last_blocks[block])

    def streams_to(self, device: torch.device, dtype: torch.dtype, hooks: Iterable[dict[int, Any]]) -> bool:
        """Whether all weights come to this device in this dtype, and the modules have no hooks but the stream's."""
        hook_ids = {hook.id for hook in self.hooks}
        return (device, {dtype}) == (self.device.device, self.dtypes) and all(
            hook_ids.issuperset(module_hooks) for module_hooks in hooks if module_hooks
        )

    def close(self) -> None:
        """Ends streaming, even in the middle of a forward: all weights are then those in main memory."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        self._drop_prefetched()
        self._drop_active()
        for unit in dict.fromkeys(self.order):
            unit.offload()

    def _onload(self, unit: Unit) -> None:
        if not self.prefetched or self.prefetched[0][0] is not unit:
            self._restart_at(unit)
        _, slot, transfer = self.prefetched.popleft()
        self.active[unit] = slot
        transfer.wait()
        if (unit, slot) not in self.views:
            self.views[unit, slot] = unit.views(self.slots[slot])
        self.onloaded(unit, self.views[unit, slot], transfer.changed)
        unit.point_to(self.views[unit, slot])

    def _free_slot(self, unit: Unit) -> None:
        self.free_slots.append((self.active.pop(unit), self.device.record_event()))
        self._prefetch()

    def _prefetch(self) -> None:
        while self.free_slots:
            unit = self.order[self.next]
            slot, event = self.free_slots.popleft()
            transfer = self.loader.fetch(unit, self.slots[slot][: unit.size], event, repeated=True)
            self.prefetched.append((unit, slot, transfer))
            self.next = (self.next + 1) % len(self.order)

    def _restart_at(self, unit: Unit) -> None:
        """Drops prefetched units, for a forward in another order or after an interrupted one."""
        self._drop_active()
        self._drop_prefetched()
        self.next = self.order.index(unit)
        self._prefetch()

    def _drop_active(self) -> None:
        for interrupted, slot in self.active.items():
            self.free_slots.append((slot, self.device.record_event()))
            interrupted.point_to(interrupted.host_tensors)
        self.active.clear()

    def _drop_prefetched(self) -> None:
        for _, slot, transfer in self.prefetched:
            with suppress(Exception):  # an error of reading is raised again when the unit is needed
                transfer.wait()
            self.free_slots.append((slot, self.device.record_event()))
        self.prefetched.clear()
