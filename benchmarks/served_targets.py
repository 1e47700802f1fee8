"""Promised figures of benchmarks/served.py, and the rows that they are read from."""

from collections.abc import Callable, Iterable
from typing import Any

from machine import print_table
from targets import Results, Target

STATIC = ("--disable-dynamic-vram",)
LIMITS = (16.0, 12.0, 8.0, 6.0, 4.0)  # GB

# (nodes, GB or all, flags) of `--table`, the most important first.
TABLE: list[tuple[str, float | None, tuple[str, ...]]] = [
    ("cold", None, ()),
    *((who, None, ()) for who in ("ours", "mixed", "native", "headless")),
    *(("ours", limit, ()) for limit in LIMITS),
    ("ours", 8.0, STATIC),
    *(("native", limit, ()) for limit in (12.0, 8.0)),
    ("native", 8.0, STATIC),
]


def _of(
    who: str, quantity: str, memory: float | None = None, flags: tuple[str, ...] = ()
) -> Callable[[Results], float]:
    return lambda rows: rows[who, memory, flags][quantity]


def _faster(quantity: str) -> Callable[[Results], float]:
    return lambda rows: rows["native", None, ()][quantity] / rows["ours", None, ()][quantity]


def _compiled_before(rows: Results) -> float:
    row = rows["ours", None, ()]
    if not row["compiled"]:
        raise LookupError("kernels were compiled for its first picture")
    return row["first"]


def _to_the_file(rows: Results) -> float:
    row = rows["headless", None, ()]
    return row["prompt"] + row["png"]


SERVED = [
    Target("as it comes, new seed", "s", 0.85, _of("ours", "seed")),
    Target("as it comes, new prompt", "s", 1.0, _of("ours", "prompt")),
    Target("faster than ComfyUI's own nodes, new seed", "×", 5, _faster("seed"), at_least=True),
    Target("faster than ComfyUI's own nodes, new prompt", "×", 5, _faster("prompt"), at_least=True),
    Target("KSampler on our MODEL, VAEDecode on our VAE", "s", 1.0, _of("mixed", "seed")),
    *(
        Target(f"{limit:g} GB", "s", bound, _of("ours", "seed", limit))
        for limit, bound in zip(LIMITS, (0.95, 1.0, 1.4, 2.0, 3.5), strict=True)
    ),
    Target(f"8 GB {STATIC[0]}", "s", 1.4, _of("ours", "seed", 8.0, STATIC)),
    Target("first picture, nothing compiled", "s", 10, _of("cold", "first")),
    Target("first picture, compiled before", "s", 5, _compiled_before),
]
WITHOUT_COMFYUI = [Target("without ComfyUI, text and PNG included", "s", 0.72, _to_the_file)]


def compared(rows: Iterable[dict[str, Any]]) -> list[list[str]]:
    """Version, target, measured, promised, met or missed, for each version and promise.

    A promise with a flag applies to versions that were started with it; others do not have the flag.
    """
    rows = list(rows)
    table = []
    for version in sorted({row["comfyui"] for row in rows if row["comfyui"]}, key=numbers):
        own = [row for row in rows if row["comfyui"] == version]
        flagged = any(tuple(row["flags"]) == STATIC for row in own)
        promises = [promise for promise in SERVED if flagged or STATIC[0] not in promise.name]
        table += [[version, *promise.row(_by_place(own))] for promise in promises]
    without = _by_place(row for row in rows if row["comfyui"] is None)
    return [*table, *(["", *promise.row(without)] for promise in WITHOUT_COMFYUI)]


def _by_place(rows: Iterable[dict[str, Any]]) -> Results:
    return {(row["who"], row["memory"], tuple(row["flags"])): row for row in rows if "error" not in row}


def numbers(version: str) -> list[int]:
    """The version's numbers, such as [0, 33, 0]."""
    return [int(part) for part in version.split(".") if part.isdigit()]


def report(rows: Iterable[dict[str, Any]]) -> bool:
    """Prints promises beside measurements. Returns whether all are met."""
    table = compared(rows)
    print_table(["ComfyUI", "target", "measured", "promised", ""], table)
    missed = [row for row in table if row[-1] == "missed"]
    for version, name, measured, promised, _ in missed:
        print(
            f"OUTSIDE ITS BOUND: {' '.join(filter(None, [version, name]))}: {measured}, promised {promised}"
        )
    return not missed and all(row[-1] == "met" for row in table)
