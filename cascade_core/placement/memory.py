"""One device's memory, shared by the networks that run on it.

Placement falls back in three steps: next to the other networks; after evicting as few of their units as possible;
streamed. A run that nevertheless runs out of memory is repeated in the next smaller placement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..adapters.apply import Patch
from ..checkpoints.pages import mapped_files
from .device import Device, out_of_memory
from .loader import Loader
from .placement import Placement, WeightConsumer
from .plan import StreamingPlan, plan_streaming
from .units import UNIT_BYTES

T = TypeVar("T")

STALE_RUNS = 8  # a network unused for this many runs is evicted first


class DeviceMemory:
    """The networks on one device. Not thread-safe."""

    def __init__(self, device: Device, unit_bytes: int = UNIT_BYTES):
        self.device = device
        self.unit_bytes = unit_bytes
        self.loader = Loader(device)
        self.placements: WeakKeyDictionary[nn.Module, Placement] = WeakKeyDictionary()
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
    ) -> T:
        """body(device) with the network on the device, patched.

        Where the body runs out of memory, it is called again in the next smaller placement: it must start from the
        beginning each time. Afterwards the resident part of the network stays on the device.

        workspace_bytes: memory that the body takes beside the weights, including that of the network's CUDA graphs.
        notify: is told of each smaller placement, in a sentence.
        single_use: stream this network instead of evicting others; each weight is read only once anyway.
        consumer: the engine that the body calls in place of the network. It is given the placement, and is told before
            weights leave the device, in this run or in later ones.

        Raises CascadeError for patches that do not fit, torch.OutOfMemoryError where no placement is small enough.
        """
        placement = self._placement(network)
        changes = placement.changes_by(network, patches)
        placement.set_changes(changes, dict.fromkeys(changes, tuple(patches)))
        if consumer is not None:
            consumer.placement = placement
            placement.consumers.add(consumer)
        workspace_bytes = max(workspace_bytes - self._graph_bytes(placement), 0)
        with self.device.limited():
            plan = self._plan(placement, workspace_bytes, single_use)
            while True:
                try:
                    with self._onloaded(placement, plan, workspace_bytes):
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
        others = (
            sum(candidate.resident_bytes for candidate in self._evictable(placement)) if keep_others else 0
        )
        return self._budget(placement, keep_others) - placement.footprint(placement.units) - others

    def resident_share(self, network: nn.Module) -> float:
        """The share of a network's bytes that is on the device."""
        placement = self._placement(network)
        return placement.resident_bytes / placement.footprint(placement.units)

    def release(self) -> None:
        """Offloads all networks."""
        for placement in self.placements.values():
            placement.offload(placement.resident)
        self.device.trim()

    # Contents

    def _placement(self, network: nn.Module) -> Placement:
        if network not in self.placements:
            self.placements[network] = Placement(network, self.device, self.loader, self.unit_bytes)
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
                self.runs - candidate.last_run < STALE_RUNS,
                bool(candidate.consumers),
                -candidate.last_run,
            ),
        )

    def _graph_bytes(self, placement: Placement) -> int:
        return placement.graph_bytes(self.device.device)

    # Placements

    def _budget(self, placement: Placement, keep_others: bool) -> int:
        """Bytes for weights and this network's runs, if the others' graphs are freed, or (keep_others) stay."""
        evicted = [] if keep_others else self._evictable(placement)
        return self._device_budget() + sum(self._graph_bytes(candidate) for candidate in evicted)

    def _device_budget(self) -> int:
        """Bytes for weights and runs, beside all existing graphs."""
        graphs = sum(self._graph_bytes(placement) for placement in self.placements.values())
        return self.device.budget(self._all_resident_bytes() + graphs) - graphs

    def _all_resident_bytes(self) -> int:
        return sum(placement.resident_bytes for placement in self.placements.values())

    def _plan(self, placement: Placement, workspace_bytes: int, single_use: bool) -> StreamingPlan:
        free_bytes = self._budget(placement, single_use) - workspace_bytes
        free_bytes -= sum(
            each.resident_bytes for each in self.placements.values() if each.in_use and each is not placement
        )
        if single_use:
            free_bytes -= sum(candidate.resident_bytes for candidate in self._evictable(placement))
        return plan_streaming(placement.units, placement.order, free_bytes, self.device.footprint)

    def _smaller_plan(self, placement: Placement, plan: StreamingPlan) -> tuple[StreamingPlan, str] | None:
        """The next smaller placement, with its description; None after the smallest."""
        candidates = self._evictable(placement)
        if any(candidate.resident for candidate in candidates):
            for candidate in candidates:
                candidate.offload(candidate.resident)
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
        smaller = plan_streaming(placement.units, placement.order, free_bytes, self.device.footprint)
        return smaller, description

    def _evict(self, placement: Placement, needed_bytes: int) -> None:
        """Offloads units of other networks, the last first, until `needed_bytes` fit beside the resident ones."""
        evicted = False
        for candidate in self._evictable(placement):
            # The budget grows as well, since graphs are freed with the weights.
            excess = self._all_resident_bytes() + needed_bytes - self._device_budget()
            units = []
            for unit in reversed(candidate.resident):
                if excess <= 0:
                    break
                units.append(unit)
                excess -= self.device.footprint(unit.size)
            candidate.offload(units)
            evicted = evicted or bool(units)
        if evicted:
            self.device.trim()

    @contextmanager
    def _onloaded(self, placement: Placement, plan: StreamingPlan, workspace_bytes: int) -> Iterator[None]:
        """The network on the device inside the block, as the plan says."""
        self.runs += 1
        placement.last_run, placement.in_use = self.runs, True
        stream = None
        try:
            placement.offload([unit for unit in placement.resident if unit in plan.streamed])
            resident = [unit for unit in placement.units if unit not in plan.streamed]
            missing = [unit for unit in resident if unit.device_buffer is None]
            self._evict(
                placement, placement.footprint(missing) + placement.slot_bytes(plan) + workspace_bytes
            )
            placement.onload(resident)
            if plan.streamed:
                placement.stream = stream = placement.new_stream(plan)
                stream.open()
            yield
        finally:
            placement.stream = None
            if stream is not None:
                stream.close()
            placement.in_use = False
