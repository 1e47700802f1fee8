"""One device's memory, shared by the networks that run on it.

Each run gets its network placed as whole as its memory allows: beside the others; in their place, of which as little
leaves as need be; streamed. Out of memory, it is run again in the next smaller placement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar
from weakref import WeakKeyDictionary, WeakMethod

import torch
from torch import Tensor, nn

from ..adapters.apply import Patch
from ..checkpoints.pages import mapped_files
from .device import Device, out_of_memory
from .placement import Changes, Placed, patch_unit, stand_in
from .plan import Plan, plan
from .stream import Stream
from .loader import Arrival, Supply
from .units import UNIT_BYTES, Unit

T = TypeVar("T")

STALE = 8  # a network that so many runs have not used goes first

_PLACED: WeakKeyDictionary[nn.Module, Placed] = WeakKeyDictionary()


def is_resident(network: nn.Module) -> bool:
    """Whether all of a network's weights are on a device and stay at their addresses until it leaves (`when_leaving`).

    A patched weight is another parameter, at the address of the one that it stands in for.
    """
    placed = _PLACED.get(network)
    return placed is not None and all(unit.slab is not None for unit in placed.units)


def placed_as(network: nn.Module) -> Placed | None:
    """A network's units, and what streams them now; None where no pool has placed it."""
    return _PLACED.get(network)


def when_leaving(network: nn.Module, callback: Callable[[], object]) -> None:
    """Has `callback()` called before weights of a placed network leave the device, to let go of what came from them.

    callback: a method, which does not keep its object alive.
    """
    placed = _PLACED.get(network)
    if placed is not None:
        placed.leaving.add(WeakMethod(callback))


class Pool:
    """Networks on one device. For one thread at a time."""

    def __init__(self, device: Device, unit_bytes: int = UNIT_BYTES):
        self.device = device
        self.unit_bytes = unit_bytes
        self.supply = Supply(device)
        self.placed: WeakKeyDictionary[nn.Module, Placed] = WeakKeyDictionary()
        self.runs = 0

    def run(
        self,
        network: nn.Module,
        body: Callable[[torch.device], T],
        working: int = 0,
        patches: Sequence[Patch] = (),
        tell: Callable[[str], object] = lambda text: None,
        once: bool = False,
    ) -> T:
        """body(device) with the network on the device, patched.

        working: bytes that the body takes beside the weights; what graphs of the network hold is part of them. Where
        that, or anything else, is too much for the memory, the body is run anew in the next smaller placement, which
        `tell` is told; it must begin from nothing each time. Afterwards as much of the network stays on the device as
        was there.
        once: the network is run once, so that it is streamed rather than that others leave: it comes but once anyway.

        Raises CascadeError for patches that do not fit, torch.OutOfMemoryError where no placement is small enough.
        """
        placed = self._place(network)
        changes = placed.changes(network, patches)
        working = max(working - self.device.held(network), 0)
        now = self._plan(placed, working, once)
        while True:
            try:
                with self._on_device(placed, now, working, tuple(patches), changes):
                    return body(self.device.device)
            except Exception as error:
                smaller = self._smaller(placed, now) if out_of_memory(error) else None
                if smaller is None:
                    raise
            # Only here are the frames gone that held the run's tensors.
            now, what = smaller
            self.device.trim()
            tell(f"out of memory; trying again {what}.")

    def room(self, network: nn.Module, beside: bool = False) -> int:
        """Bytes for what a run takes beside the network's weights, if the others leave or (beside) stay."""
        placed = self._place(network)
        others = sum(self._on(other) for other in self._others(placed)) if beside else 0
        return self._budget(placed, beside) - self._need(placed.units) - others

    def staying(self, network: nn.Module) -> float:
        """The share of a network's bytes that is on the device."""
        placed = self._place(network)
        return self._on(placed) / self._need(placed.units)

    def release(self) -> None:
        """Takes everything off the device."""
        for placed in self.placed.values():
            placed.leave(placed.there)
        self.device.trim()

    # What is where

    def _place(self, network: nn.Module) -> Placed:
        if network not in self.placed:
            self.placed[network] = _PLACED[network] = Placed(network, self.unit_bytes)
            self.supply.files = mapped_files()
        return self.placed[network]

    def _others(self, placed: Placed) -> list[Placed]:
        """The other networks that could leave, the first to go first.

        Stages run in turn, so the one that ran last is the one that is needed last; but for those that no run needs any
        more, and after those that nothing was made from, which would have to be made again.
        """
        others = [other for other in self.placed.values() if other is not placed and not other.in_use]
        return sorted(
            others, key=lambda other: (self.runs - other.run < STALE, bool(other.leaving), -other.run)
        )

    def _need(self, units: Sequence[Unit]) -> int:
        return sum(self.device.footprint(unit.size) for unit in units)

    def _on(self, placed: Placed) -> int:
        return self._need(placed.there)

    def _ours(self) -> int:
        return sum(self._on(placed) for placed in self.placed.values())

    # Placements

    def _budget(self, placed: Placed, beside: bool) -> int:
        """Bytes for weights and what this network's runs take, if the others' graphs go or (beside) stay."""
        leaving = [] if beside else [n for n, other in self.placed.items() if other in self._others(placed)]
        return self.device.budget(self._ours()) + sum(self.device.held(network) for network in leaving)

    def _plan(self, placed: Placed, working: int, once: bool) -> Plan:
        room = self._budget(placed, once) - working
        room -= sum(self._on(other) for other in self.placed.values() if other.in_use and other is not placed)
        if once:
            room -= sum(self._on(other) for other in self._others(placed))
        return plan(placed.units, placed.order, room, self.device.footprint)

    def _slots(self, now: Plan) -> int:
        return now.slots * self.device.footprint(now.slot)

    def _smaller(self, placed: Placed, now: Plan) -> tuple[Plan, str] | None:
        """The next smaller placement, with its name; None after the smallest."""
        others = self._others(placed)
        if any(other.there for other in others):
            for other in others:
                other.leave(other.there)
            return now, "with the other stages off the device"
        blocks = self._need([unit for unit in dict.fromkeys(placed.order) if unit not in now.streamed])
        if not blocks:
            return None
        rest = self._need(placed.units[:1])
        room = rest + blocks // 2 if not now.streamed else 0
        how = "with half of the weights streamed from main memory" if room else "with all blocks streamed"
        return plan(placed.units, placed.order, room, self.device.footprint), how

    def _make_room(self, placed: Placed, need: int) -> None:
        """As many units of others leave, from their last on, as that `need` bytes and what is there fit."""
        left = False
        for other in self._others(placed):
            # The budget grows as well: graphs leave with weights.
            excess = self._ours() + need - self.device.budget(self._ours())
            going = []
            for unit in reversed(other.there):
                if excess <= 0:
                    break
                going.append(unit)
                excess -= self.device.footprint(unit.size)
            other.leave(going)
            left = left or bool(going)
        if left:
            self.device.trim()

    @contextmanager
    def _on_device(
        self, placed: Placed, now: Plan, working: int, patches: tuple[Patch, ...], changes: Changes
    ) -> Iterator[None]:
        self.runs += 1
        placed.run, placed.in_use = self.runs, True
        stream = None
        try:
            placed.leave([unit for unit in placed.there if unit in now.streamed])
            staying = [unit for unit in placed.units if unit not in now.streamed]
            missing = [unit for unit in staying if unit.slab is None]
            self._make_room(placed, self._need(missing) + self._slots(now) + working)
            self._bring(staying, patches, changes)
            if now.streamed:
                for unit in now.streamed:
                    stand_in(unit, changes.get(unit))
                stream = Stream(
                    self.device,
                    self.supply,
                    placed.order,
                    now,
                    lambda unit, weights: patch_unit(weights, changes.get(unit)),
                )
                placed.stream = stream
                stream.open()
            yield
        finally:
            placed.stream = None
            if stream is not None:
                stream.close()
            for unit in now.streamed:
                unit.leave()
            placed.in_use = False

    def _bring(self, units: Sequence[Unit], patches: tuple[Patch, ...], changes: Changes) -> None:
        """Units that stay lie on the device, patched, for what is computed from here on."""
        coming: list[tuple[Unit, Tensor]] = []
        for unit in units:
            if unit.slab is None:
                coming.append((unit, self.device.empty(unit.size)))
            elif unit.patches != (patches if unit in changes else ()):
                coming.append((unit, unit.slab))
        for unit, _ in coming:
            unit.leave()  # until it is whole
        after = self.device.mark()  # memory that was let go before may still be in use until then
        arrivals: list[Arrival] = []
        try:
            for unit, slab in coming:
                arrivals.append(self.supply.fetch(unit, slab, after, often=False))
            for arrival in arrivals:
                arrival.wait()
        except BaseException:
            for arrival in arrivals:  # no copy may come into memory that has been let go
                with suppress(Exception):
                    arrival.wait()
            raise
        for unit, slab in coming:
            stand_in(unit, changes.get(unit))
            weights = unit.views(slab)
            unit.point(weights)
            patch_unit(weights, changes.get(unit))
            unit.slab, unit.patches = slab, patches if unit in changes else ()
