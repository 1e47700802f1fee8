"""Units on their way through a few slots: the next is copied while the one before it computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from .device import Device
from .plan import Plan
from .loader import Arrival, Supply
from .units import Unit


class Stream:
    """Streams a plan's units for as many forwards as are run between `open` and `close`.

    Hooks on the blocks say when a unit is needed and when it has been used; the engine, which does not call them, says
    it itself (`before`, `after`). Ahead of that, units are fetched in the order in which forwards need them, as far as
    there are free slots, from one forward into the next.

    arrived(unit, weights): is called when a unit's weights lie in their slot, before they are used.
    """

    def __init__(
        self,
        device: Device,
        supply: Supply,
        order: Sequence[Unit],
        plan: Plan,
        arrived: Callable[[Unit, list[Tensor]], None],
    ):
        self.device, self.supply, self.arrived = device, supply, arrived
        self.order = [unit for unit in order if unit in plan.streamed]
        self.first = {unit.blocks[0]: unit for unit in self.order}
        self.last = {unit.blocks[-1]: unit for unit in self.order}
        self.slots = [device.empty(plan.slot) for _ in range(plan.slots)]
        self.views: dict[tuple[Unit, int], list[Tensor]] = {}
        self.ahead: deque[tuple[Unit, int, Arrival]] = deque()
        self.held: dict[Unit, int] = {}
        self.next = 0  # in the order: what is fetched when a slot is free
        self.hooks: list[Any] = []
        begin = device.mark()  # memory that was let go before may still be in use until then
        self.free: deque[tuple[int, Any]] = deque((slot, begin) for slot in range(plan.slots))

    def open(self) -> None:
        """From now on the blocks can be run."""
        for block in self.first:
            self.hooks.append(block.register_forward_pre_hook(lambda block, *_: self.before(block)))
        for block in self.last:
            self.hooks.append(block.register_forward_hook(lambda block, *_: self.after(block)))
        self._fetch_ahead()

    def before(self, block: nn.Module) -> None:
        """The block is about to be run."""
        if block in self.first:
            self.enter(self.first[block])

    def after(self, block: nn.Module) -> None:
        """The block has been run, as far as it reads its weights."""
        if block in self.last:
            self.leave(self.last[block])

    def bring_to(self, device: torch.device, hooks: Iterable[dict[int, Any]]) -> bool:
        """Whether weights come to this device, and the hooks of all modules are the stream's own."""
        own = {hook.id for hook in self.hooks}
        return device == self.device.device and all(own.issuperset(of) for of in hooks if of)

    def enter(self, unit: Unit) -> None:
        """The unit is about to be used: it lies in a slot from here on."""
        if not self.ahead or self.ahead[0][0] is not unit:
            self._begin_at(unit)
        _, slot, arrival = self.ahead.popleft()
        self.held[unit] = slot
        arrival.wait()
        if (unit, slot) not in self.views:
            self.views[unit, slot] = unit.views(self.slots[slot])
        unit.point(self.views[unit, slot])
        self.arrived(unit, self.views[unit, slot])

    def leave(self, unit: Unit) -> None:
        """The unit has been used: its slot is free for the next one."""
        self.free.append((self.held.pop(unit), self.device.mark()))
        self._fetch_ahead()

    def close(self) -> None:
        """Ends streaming, in the middle of a forward too: everything lies in main memory as it was."""
        for hook in self.hooks:
            hook.remove()
        self._drop_ahead()
        for unit in dict.fromkeys(self.order):
            unit.leave()
        self.views.clear()
        self.slots.clear()

    def _fetch_ahead(self) -> None:
        while self.free:
            unit = self.order[self.next]
            slot, after = self.free.popleft()
            arrival = self.supply.fetch(unit, self.slots[slot][: unit.size], after, often=True)
            self.ahead.append((unit, slot, arrival))
            self.next = (self.next + 1) % len(self.order)

    def _begin_at(self, unit: Unit) -> None:
        """A forward that runs in another order, or began anew: what was fetched for the former is not waited for."""
        for held, slot in self.held.items():  # of a forward that was broken off
            self.free.append((slot, self.device.mark()))
            held.point(held.home)
        self.held.clear()
        self._drop_ahead()
        self.next = self.order.index(unit)
        self._fetch_ahead()

    def _drop_ahead(self) -> None:
        for _, slot, arrival in self.ahead:
            with suppress(Exception):  # of the reading: whoever needs the unit will see it again
                arrival.wait()
            self.free.append((slot, self.device.mark()))
        self.ahead.clear()
