"""Which units of a network stay on the device and which are streamed, from the room that its weights have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from .units import Unit

SLOTS = 2  # one unit computes while the next arrives
USUAL = 1.25  # times the median: larger units stay, where that is enough


@dataclass(frozen=True)
class Plan:
    """streamed: the units that pass through `slots` slots of `slot` bytes; all others stay."""

    streamed: frozenset[Unit] = field(default_factory=frozenset)
    slots: int = 0
    slot: int = 0


def plan(
    units: Sequence[Unit], order: Sequence[Unit], room: int, footprint: Callable[[int], int] = int
) -> Plan:
    """As little as possible is streamed: what a forward uses least often, and of that the last, evenly spread.

    Spread, because while a unit that stays computes, the next streamed one arrives: were the streamed ones together,
    all of them but the first would be waited for. Where even the least does not fit, it is tried.
    """
    total = sum(footprint(unit.size) for unit in units)
    if total <= room or not order:
        return Plan()
    uses = Counter(order)
    slot = USUAL * median(unit.size for unit in uses)
    candidates = [
        unit for unit in uses if unit.size <= slot
    ]  # a slot is as large as the largest that is streamed
    excess = total + SLOTS * footprint(max(unit.size for unit in candidates)) - room
    if sum(footprint(unit.size) for unit in candidates) < excess:
        candidates = list(uses)
        excess = total + SLOTS * footprint(max(unit.size for unit in candidates)) - room
    streamed: list[Unit] = []
    for count in sorted(set(uses.values())):
        group = [unit for unit in candidates if uses[unit] == count]
        if not group:
            continue
        taken = _spread(group, excess, footprint)
        streamed += taken
        excess -= sum(footprint(unit.size) for unit in taken)
        if excess <= 0:
            break
    slot = max(unit.size for unit in streamed)
    return Plan(frozenset(streamed), min(SLOTS, len(streamed)), slot)


def _spread(group: Sequence[Unit], excess: int, footprint: Callable[[int], int]) -> list[Unit]:
    """Units of together `excess` bytes or all of them, evenly among the others, from the last on."""
    whole = sum(footprint(unit.size) for unit in group)
    share = min(excess / whole, 1.0)
    taken: list[Unit] = []
    held = passed = 0
    for unit in reversed(group):
        size = footprint(unit.size)
        passed += size
        if held < share * passed:
            taken.append(unit)
            held += size
    return taken
