"""Shares with confidence intervals, also by kind of object, so that an average hides nothing."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import sqrt
from typing import NamedTuple

from cascade_nodes.demo.captions import Spec
from cascade_nodes.demo.judge import Score

Z = 1.96  # of an interval that holds the true share in 95 of 100 cases


class Share(NamedTuple):
    """A proportion of a count, with Wilson's confidence interval (Wilson 1927, "Probable inference")."""

    share: float
    low: float
    high: float
    count: int


def share(verdicts: Iterable[bool]) -> Share:
    """Computes the share of true verdicts; nan where there are none."""
    values = list(verdicts)
    n = len(values)
    if not n:
        return Share(float("nan"), 0.0, 1.0, 0)
    p, z2 = sum(values) / n, Z * Z
    middle, half = (p + z2 / (2 * n)), Z * sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return Share(p, max((middle - half) / (1 + z2 / n), 0.0), min((middle + half) / (1 + z2 / n), 1.0), n)


Groups = dict[str, dict[str, Share]]  # {"shape": {"star": …}, …}


def by_kind(scores: Sequence[Score], specs: Sequence[Spec], only: int | None = None) -> Groups:
    """Shares of objects right in every stated attribute, by shape, colour, size, and pair of shape and colour.

    only: index of the object to count in each spec; None: all objects.
    """
    groups: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for score, spec in zip(scores, specs, strict=True):
        for place, (verdict, stated) in enumerate(zip(score.objects, spec.objects, strict=True)):
            if only not in (None, place):
                continue
            right = False not in verdict.verdicts
            names = {"shape": stated.shape, "colour": stated.colour, "size": stated.size}
            if stated.shape and stated.colour:
                names["pair"] = f"{stated.colour} {stated.shape}"
            for kind, name in names.items():
                if name:
                    groups[kind][name].append(right)
    return {
        kind: {name: share(group) for name, group in sorted(names.items())} for kind, names in groups.items()
    }


def lowest(groups: dict[str, Share], count: int = 8) -> str:
    """Names the groups with the smallest shares, with their intervals."""
    least = sorted(groups.items(), key=lambda group: group[1].share)[:count]
    return ", ".join(f"{name} {s.share:.2f} ({s.low:.2f}-{s.high:.2f})" for name, s in least)
