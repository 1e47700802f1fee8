"""One device's memory, shared by the networks that run on it.

Placement falls back in three steps: next to the other networks; after evicting as few of their units as possible;
streamed. A run that nevertheless runs out of memory is repeated in the next smaller placement.

Where stages do not quite fit together, the same units leave and come back for each picture. Then a unit takes the place
of another network's, whose memory stays reserved for it (`Unit.reserved_buffer`): that one comes back to the same
addresses in its turn, and no CUDA graph is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..adapters.apply import Patch
from ..checkpoints.pages import mapped_files
from .device import Device, out_of_memory
from .loader import Loader
from .placement import Placement, WeightConsumer
from .plan import StreamingPlan, plan_streaming
from .shared import RunBytes, SharedWorkspaces
from .units import UNIT_BYTES, Unit, tables_of

T = TypeVar("T")

STALE_RUNS = 8  # a network unused for this many runs is evicted first
SPARE = 0.02  # of the memory for weights and runs: `DeviceMemory._spare_bytes`
MOST_WASTE = 2  # times its own bytes: how large another unit's memory may be for one to take it over


class DeviceMemory:
    """The networks on one device. Not thread-safe."""

    def __init__(self, device: Device, unit_bytes: int = UNIT_BYTES):
        self.device = device
        self.unit_bytes = unit_bytes
        self.loader = Loader(device)
        self.placements: WeakKeyDictionary[nn.Module, Placement] = WeakKeyDictionary()
        self.shared = SharedWorkspaces()
        self.runs = 0

    def run(
        self,
        network: nn.Module,
        body: Callable[[torch.device], T],
        workspace_bytes: int = 0,
        patches: Sequence[Patch] = (),
        notify: Callable[[str], object] = lambda text: None,
        single_use: bool = False,
        consumer: WeightConsumer | None = None,
        known_bytes: RunBytes | None = None,
    ) -> T:
        """body(device) with the network on the device, patched.

        Where the body runs out of memory, it is called again in the next smaller placement: it must start from the
        beginning each time. Afterwards the resident part of the network stays on the device.

        workspace_bytes: memory that the body takes beside the weights, including that of the network's CUDA graphs.
        notify: is told of each smaller placement, in a sentence.
        single_use: stream this network instead of evicting others; each weight is read only once anyway.
        consumer: the engine that the body calls in place of the network. It is given the placement, and is told before
            weights leave the device for good, in this run or in later ones.
        known_bytes: what the body takes instead of `workspace_bytes` if all weights are resident.

        Raises CascadeError for patches that do not fit, torch.OutOfMemoryError where no placement is small enough.
        """
        placement = self._placement(network)
        changes = placement.changes_by(network, patches)
        placement.set_changes(changes, dict.fromkeys(changes, tuple(patches)))
        if consumer is not None:
            consumer.placement = placement
            placement.consumers.add(consumer)
        with self.device.limited():
            plan = self._plan(placement, workspace_bytes, known_bytes, single_use)
            if plan.streamed and known_bytes is not None:
                known_bytes = None  # of a CUDA graph: there is none
                plan = self._plan(placement, workspace_bytes, known_bytes, single_use)
            while True:
                try:
                    with self._onloaded(placement, plan, workspace_bytes, known_bytes):
                        return body(self.device.device)
                except Exception as error:
                    smaller = self._smaller_plan(placement, plan) if out_of_memory(error) else None
                    if smaller is None:
                        raise
                # Only outside of the except block are the frames gone that referred to the run's tensors.
                plan, description = smaller
                self.device.trim()
                notify(f"out of memory; trying again {description}.")

    def free_bytes(self, network: nn.Module, keep_others: bool = False) -> int:
        """Bytes left to a run beside the network's weights, if the others are evicted, or (keep_others) stay."""
        placement = self._placement(network)
        others = self._weight_bytes(self._evictable(placement)) if keep_others else 0
        return self._budget(placement, keep_others) - placement.footprint(placement.units) - others

    def resident_share(self, network: nn.Module) -> float:
        """The share of a network's bytes that is on the device."""
        placement = self._placement(network)
        return placement.resident_bytes / placement.footprint(placement.units)

    def release(self) -> None:
        """Offloads all networks."""
        for placement in self.placements.values():
            placement.offload(placement.reserved)
        self.device.trim()

    # Contents

    def _placement(self, network: nn.Module) -> Placement:
        if network not in self.placements:
            self.placements[network] = Placement(
                network, self.device, self.loader, self.unit_bytes, self.shared
            )
            self.loader.mapped_files = mapped_files()
        return self.placements[network]

    def _evictable(self, placement: Placement) -> list[Placement]:
        """The other networks that can be evicted, in the order of eviction.

        Stages run in turn, so the one that ran last is needed last and goes first. Before it go networks that no run
        needs any more, and those without consumers, since the values that a consumer derived would have to be
        computed again.
        """
        idle = [each for each in self.placements.values() if each is not placement and not each.in_use]
        return sorted(
            idle,
            key=lambda candidate: (
                not self._is_stale(candidate),
                bool(candidate.consumers),
                -candidate.last_run,
            ),
        )

    def _is_stale(self, placement: Placement) -> bool:
        return self.runs - placement.last_run >= STALE_RUNS

    def _derived_bytes(self, placements: Iterable[Placement]) -> int:
        """Bytes on the device that go with weights: of graphs, and of what else was made from them."""
        device = self.device.device
        return sum(each.graph_bytes(device) + each.cache_bytes(device) for each in placements)

    def _weight_bytes(self, placements: Iterable[Placement]) -> int:
        """Bytes on the device that are kept for these networks' units, which may share them."""
        buffers = {
            id(unit.reserved_buffer): unit.reserved_buffer
            for placement in placements
            for unit in placement.reserved
        }
        return sum(self.device.footprint(buffer.nbytes) for buffer in buffers.values() if buffer is not None)

    def _in_use(self, placement: Placement) -> list[Placement]:
        """The other networks that a run is in."""
        return [each for each in self.placements.values() if each.in_use and each is not placement]

    # Placements

    def _budget(self, placement: Placement, keep_others: bool) -> int:
        """Bytes for weights and this network's runs, if graphs of the others go with them or (keep_others) stay."""
        if keep_others:
            return self._device_budget()
        staying = [each.shared_workspaces() for each in (placement, *self._in_use(placement))]
        kept = {id(piece) for pieces in staying for piece in pieces}
        gone = self._shared_bytes(piece for piece in self.shared.pieces() if id(piece) not in kept)
        return self._device_budget() + gone + self._derived_bytes(self._evictable(placement))

    def _device_budget(self) -> int:
        """Bytes for weights and runs, next to all graphs that there are."""
        graphs = self._derived_bytes(self.placements.values()) + self._shared_bytes(self.shared.pieces())
        return self.device.budget(self._weight_bytes(self.placements.values()) + graphs) - graphs

    def _shared_bytes(self, pieces: Iterable[Tensor]) -> int:
        return sum(self.device.footprint(piece.nbytes) for piece in pieces)

    def _run_bytes(
        self,
        placement: Placement,
        workspace_bytes: int,
        known_bytes: RunBytes | None,
        shared: Iterable[Tensor],
    ) -> int:
        """What a run takes next to the weights, beside what its graphs have already. shared: what they can use"""
        own = self._derived_bytes([placement])
        if known_bytes is None:  # the forward that is recorded allocates by itself
            return max(workspace_bytes - own, 0)
        largest = max((piece.nbytes for piece in shared), default=0)
        workspace = 0 if known_bytes.workspace <= largest else known_bytes.workspace
        return max(known_bytes.caches - own, 0) + workspace

    def _plan(
        self, placement: Placement, workspace_bytes: int, known_bytes: RunBytes | None, single_use: bool
    ) -> StreamingPlan:
        shared = placement.shared_workspaces()
        free_bytes = self._budget(placement, single_use) - self._weight_bytes(self._in_use(placement))
        free_bytes -= self._run_bytes(placement, workspace_bytes, known_bytes, shared)
        if single_use:
            free_bytes -= self._weight_bytes(self._evictable(placement))
        return self._streaming(placement, free_bytes)

    def _streaming(self, placement: Placement, free_bytes: float) -> StreamingPlan:
        plan = plan_streaming(placement.units, placement.order, free_bytes, self.device.footprint)
        if not plan.streamed:
            return plan
        tables = frozenset(unit for unit in tables_of(placement.units) if unit not in placement.changes)
        if not tables:
            return plan
        units = [unit for unit in placement.units if unit not in tables]
        plan = plan_streaming(units, placement.order, free_bytes, self.device.footprint)
        return replace(plan, on_host=tables)

    def _smaller_plan(self, placement: Placement, plan: StreamingPlan) -> tuple[StreamingPlan, str] | None:
        """The next smaller placement, with its description; None after the smallest."""
        candidates = self._evictable(placement)
        if any(candidate.reserved for candidate in candidates):
            for candidate in candidates:
                candidate.offload(candidate.reserved)
            return plan, "with the other stages off the device"
        blocks = placement.footprint(
            [unit for unit in dict.fromkeys(placement.order) if unit not in plan.streamed]
        )
        if not blocks:
            return None
        always_resident = placement.footprint(placement.units[:1])
        free_bytes = always_resident + blocks // 2 if not plan.streamed else 0
        description = (
            "with half of the weights streamed from main memory" if free_bytes else "with all blocks streamed"
        )
        return self._streaming(placement, free_bytes), description

    def _evict(self, placement: Placement, missing: Sequence[Unit], other_bytes: Callable[[], int]) -> None:
        """Makes room for units of a network that are missing, and for `other_bytes()` next to them.

        First those leave that nothing was made from or no run needs; then graphs whose workspace is not the one that
        all can share; then units make way for a missing one, in memory that is theirs in turn; then units leave for
        good.
        """
        candidates = self._evictable(placement)

        def excess() -> int:
            unreserved = placement.footprint(unit for unit in missing if unit.reserved_buffer is None)
            # The budget grows as graphs go with weights.
            used = self._weight_bytes(self.placements.values()) + unreserved + other_bytes()
            return used - self._device_budget()

        self._reclaim(placement, missing, candidates, excess)
        crowded = excess() > 0
        if not crowded and not any(unit.evicted and unit.reserved_buffer is None for unit in missing):
            return
        dispensable = [each for each in candidates if not each.consumers or self._is_stale(each)]
        needed = [each for each in candidates if each not in dispensable]
        self._free(placement, dispensable, excess)
        if excess() > 0:
            for candidate in self._apart(needed):  # all of them: a workspace is free once nobody keeps it
                candidate.tell_consumers()
        for unit in sorted(missing, key=lambda unit: -unit.size):
            if unit.reserved_buffer is None and excess() > (-self._spare_bytes() if unit.evicted else 0):
                unit.reserved_buffer = self._make_way(placement, unit, needed)
        self._free(placement, needed, excess)
        if crowded:
            self.device.trim()

    def _apart(self, candidates: Sequence[Placement]) -> list[Placement]:
        """Those whose graphs are in another workspace than the one that all can share."""
        largest = self.shared.largest()
        return [each for each in candidates if any(p is not largest for p in each.shared_workspaces())]

    def _spare_bytes(self) -> int:
        """Bytes that must be free for weights that had to leave to have memory of their own again."""
        return int(SPARE * self._device_budget())

    def _free(self, placement: Placement, candidates: Sequence[Placement], excess: Callable[[], int]) -> None:
        """Offloads units of the candidates, from a network's last on, until nothing is in excess."""
        kept = {id(unit.reserved_buffer) for unit in placement.reserved}
        for candidate in (*candidates, *candidates):  # what two of them share is free when both have left it
            units, needed = [], excess()
            if needed <= 0:
                return
            for unit in reversed(candidate.reserved):
                if needed > 0 and unit.reserved_buffer is not None and id(unit.reserved_buffer) not in kept:
                    units.append(unit)
                    needed -= self.device.footprint(unit.reserved_buffer.nbytes)
            candidate.offload(units)
            for unit in units:
                unit.evicted = bool(candidate.consumers)

    def _reclaim(
        self,
        placement: Placement,
        missing: Sequence[Unit],
        candidates: Sequence[Placement],
        excess: Callable[[], int],
    ) -> None:
        """Others make way where missing units were before.

        Where one is in use, or there is plenty of memory by now, that is theirs no longer.
        """
        in_use = {id(unit.reserved_buffer) for each in self._in_use(placement) for unit in each.resident}
        placement.offload([unit for unit in missing if id(unit.reserved_buffer) in in_use])
        occupied = {id(unit.reserved_buffer): unit for unit in missing if unit.reserved_buffer is not None}
        shared = [
            occupied[id(unit.reserved_buffer)]
            for each in candidates
            for unit in each.resident
            if id(unit.reserved_buffer) in occupied
        ]
        if shared and excess() + placement.footprint(shared) <= -self._spare_bytes():
            placement.offload(shared)
            return
        for candidate in candidates:
            for unit in candidate.resident:
                if id(unit.reserved_buffer) in occupied:
                    unit.offload()

    def _make_way(self, placement: Placement, unit: Unit, candidates: Sequence[Placement]) -> Tensor | None:
        """Memory that another network's unit leaves to this one until it comes back; None where none is of its size."""
        own = {id(each.reserved_buffer) for each in placement.reserved}
        for candidate in candidates:
            fitting = [
                other
                for other in candidate.resident
                if other.reserved_buffer is not None
                and unit.size <= other.reserved_buffer.nbytes <= MOST_WASTE * unit.size
                and id(other.reserved_buffer) not in own
            ]
            if fitting:
                leaving = min(fitting, key=lambda other: len(other.reserved_buffer))  # type: ignore[arg-type] (it is on the device)
                leaving.offload()
                return leaving.reserved_buffer
        return None

    @contextmanager
    def _onloaded(
        self, placement: Placement, plan: StreamingPlan, workspace_bytes: int, known_bytes: RunBytes | None
    ) -> Iterator[None]:
        """The network on the device inside the block, as the plan says."""
        self.runs += 1
        placement.last_run, placement.in_use = self.runs, True
        stream = None
        hooks = ExitStack()
        try:
            absent = plan.streamed | plan.on_host
            placement.offload([unit for unit in placement.reserved if unit in absent])
            resident = [unit for unit in placement.units if unit not in absent]
            missing = [unit for unit in resident if unit.device_buffer is None]
            slots = self._borrowed_slots(placement, plan)

            def other_bytes() -> int:
                run_bytes = self._run_bytes(placement, workspace_bytes, known_bytes, self.shared.pieces())
                return run_bytes + (placement.slot_bytes(plan) if slots is None else 0)

            self._evict(placement, missing, other_bytes)
            placement.onload(resident)
            for table in plan.on_host:
                hooks.enter_context(table.looked_up_on_host(self.device.device))
            if plan.streamed:
                placement.stream = stream = placement.new_stream(plan, slots)
                stream.open()
            yield
        finally:
            placement.stream = None
            if stream is not None:
                stream.close()
            hooks.close()
            placement.in_use = False

    def _borrowed_slots(self, placement: Placement, plan: StreamingPlan) -> Tensor | None:
        """A workspace of graphs that has room for the plan's slots, while none of them can run."""
        piece = self.shared.largest()
        fits = piece is not None and 0 < plan.slots * plan.slot_bytes <= piece.nbytes
        return piece if fits and not self._in_use(placement) else None
