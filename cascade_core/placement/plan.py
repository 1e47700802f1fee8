"""Chooses the units of a network that stay resident and those that are streamed, by the bytes free for its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .units import Unit

# One unit computes while the next is copied. Stage C's AttnBlocks take 0.8 ms each to copy at 50 GB/s and about 0.1
# ms to compute. If they are spread evenly, a unit's slot is free long before the next copy ends, so copies follow one
# another without a pause. A third slot would hide nothing more, and the bytes that it takes would have to be streamed
# too.
SLOTS = 2

Footprint = Callable[[int], int]  # size in bytes -> bytes that such an allocation takes


@dataclass(frozen=True)
class StreamingPlan:
    """streamed: the units that pass through `slots` slots of `slot_bytes` bytes; all others stay resident.

    on_host: but for these tables of embeddings, of which the rows are looked up in main memory
    """

    streamed: frozenset[Unit] = field(default_factory=frozenset)
    on_host: frozenset[Unit] = field(default_factory=frozenset, kw_only=True)
    slots: int = 0
    slot_bytes: int = 0


def plan_streaming(
    units: Sequence[Unit], order: Sequence[Unit], free_bytes: float, footprint: Footprint = int
) -> StreamingPlan:
    """Streams as few bytes as possible, choosing units that a forward uses least often, evenly spread, from the end.

    Spread, because while a resident unit computes, the next streamed one is copied: if the streamed ones were
    neighbours, the forward would wait for all of them but the first. A slot is as large as the largest streamed unit
    and takes memory itself, so only small units are streamed where these suffice. The smallest plan is returned even
    if it does not fit.

    units: all of the network's. order: those that can be streamed, as a forward runs them.
    """
    total = sum(footprint(unit.size) for unit in units)
    if total <= free_bytes or not order:
        return StreamingPlan()
    uses = Counter(order)
    plans = []
    for slot_bytes in sorted({unit.size for unit in uses}):
        candidates = [unit for unit in uses if unit.size <= slot_bytes]
        excess = total + SLOTS * footprint(slot_bytes) - free_bytes
        if sum(footprint(unit.size) for unit in candidates) >= excess:
            plans.append(_stream_excess(candidates, uses, excess, footprint))
    if not plans:
        return _stream_excess(list(uses), uses, total, footprint)
    return min(plans, key=lambda plan: sum(unit.size * uses[unit] for unit in plan.streamed))


def _stream_excess(
    candidates: Sequence[Unit], uses: Mapping[Unit, int], excess: float, footprint: Footprint
) -> StreamingPlan:
    """Streams enough of the candidates that `excess` bytes are not resident."""
    streamed: list[Unit] = []
    for count in sorted(set(uses.values())):
        group = [unit for unit in candidates if uses[unit] == count]
        if group and excess > 0:
            selected = _select_spread(group, excess, footprint)
            streamed += selected
            excess -= sum(footprint(unit.size) for unit in selected)
    slot_bytes = max(unit.size for unit in streamed)
    return StreamingPlan(frozenset(streamed), min(SLOTS, len(streamed)), slot_bytes)


def _select_spread(group: Sequence[Unit], excess: float, footprint: Footprint) -> list[Unit]:
    """Units of at least `excess` bytes in total, or all; spread evenly among the group, from the end."""
    group_bytes = sum(footprint(unit.size) for unit in group)
    share = min(excess / group_bytes, 1.0)
    selected: list[Unit] = []
    selected_bytes = passed_bytes = 0
    for unit in reversed(group):
        size = footprint(unit.size)
        passed_bytes += size
        if selected_bytes < share * passed_bytes:
            selected.append(unit)
            selected_bytes += size
    return selected
