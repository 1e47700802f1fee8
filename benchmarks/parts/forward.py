"""One forward of each stage for one picture with guidance (two rows), by every program."""

from collections.abc import Callable
from typing import Any

import torch

from bench import Bench
from loop import Program
from machine import print_table
from networks import CLASSES, TITLES, forward_inputs, latent_shape
from timing import cost

ROWS = {"stage_c": 2, "stage_b": 2, "stage_a": 1}


def call_of(
    program: Program, kind: str, bench: Bench, side: int | None = None, batch: int = 1
) -> Callable[[], Any]:
    """A forward for so many pictures of side × side."""
    side = side or bench.setup.side
    if kind == "stage_a":
        setup = bench.setup
        latents = torch.randn(batch, *latent_shape(kind, side), device=setup.device).to(setup.dtype)
        return lambda: program.decode(latents)
    x, r, given = forward_inputs(kind, bench.setup, ROWS[kind] * batch, side)
    network = getattr(program, kind)
    if program.name in bench.ours.names():
        r = r.cpu()  # as our samplers give it
    return lambda: network(x, r, **given)


def measure(bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = {}
    bench.ours.forget()
    for kind in CLASSES:
        tflop = bench.arithmetic(kind, bench.setup.side, ROWS[kind])
        found[kind] = {"tflop": tflop, "limit_ms": bench.limit_ms(tflop), "programs": {}}
    for program in bench.programs():
        for kind in CLASSES:
            with bench.apart(f"forward, {TITLES[kind]}, {program.name}"):
                call = call_of(program, kind, bench)
                found[kind]["programs"][program.name] = cost(
                    call, bench.setup.device, bench.setup.runs, warm=min(bench.setup.runs, 3)
                )
    return found


def report(found: dict[str, Any]) -> None:
    for kind, stage in found.items():
        head = f"{TITLES[kind]}, {ROWS[kind]} row{'s' * (ROWS[kind] > 1)}"
        rows = [
            [name, f"{of['ms']:.2f}", f"{of['ms'] / stage['limit_ms']:.2f}", f"{of['peak_gb']:.2f}"]
            for name, of in stage["programs"].items()
        ]
        print_table([head, "ms", "of the limit", "GB beside weights"], rows)
        print(f"limit {stage['limit_ms']:.2f} ms for {stage['tflop']:.2f} TFLOP at the measured ceiling\n")
