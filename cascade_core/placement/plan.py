"""Which units of a network stay on the device and which are streamed, from the room that its weights have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .units import Unit

# One unit computes while the next arrives. Stage C's AttnBlocks arrive in 0.8 ms each at 50 GB/s and compute in 0.1 ms
# or so; spread evenly, one's slot is free again long before the next has arrived, so copies follow one another without
# a pause. A third slot would hide nothing more, and its own bytes would have to be streamed too.
SLOTS = 2


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
    all of them but the first would be waited for. A slot is as large as the largest that is streamed, and takes room
    itself: so only small units are, where these are enough. Where even the least does not fit, it is tried.
    """
    total = sum(footprint(unit.size) for unit in units)
    if total <= room or not order:
        return Plan()
    uses = Counter(order)
    plans = []
    for slot in sorted({unit.size for unit in uses}):
        candidates = [unit for unit in uses if unit.size <= slot]
        excess = total + SLOTS * footprint(slot) - room
        if sum(footprint(unit.size) for unit in candidates) >= excess:
            plans.append(_plan(candidates, uses, excess, footprint))
    if not plans:
        return _plan(list(uses), uses, total, footprint)
    return min(plans, key=lambda found: sum(unit.size * uses[unit] for unit in found.streamed))


def _plan(
    candidates: Sequence[Unit], uses: Mapping[Unit, int], excess: int, footprint: Callable[[int], int]
) -> Plan:
    """Of the candidates so many are streamed that `excess` bytes do not stay."""
    streamed: list[Unit] = []
    for count in sorted(set(uses.values())):
        group = [unit for unit in candidates if uses[unit] == count]
        if group and excess > 0:
            taken = _spread(group, excess, footprint)
            streamed += taken
            excess -= sum(footprint(unit.size) for unit in taken)
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
