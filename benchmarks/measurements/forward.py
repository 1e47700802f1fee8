"""Forward of each stage for one picture with guidance (two rows), by every program."""

from collections.abc import Callable
from typing import Any

import torch

from context import Context
from machine import print_table
from networks import CLASSES, TITLES, forward_inputs, latent_shape
from picture import Program
from timing import cost

ROWS = {"stage_c": 2, "stage_b": 2, "stage_a": 1}


def call_of(
    program: Program, kind: str, context: Context, side: int | None = None, batch: int = 1
) -> Callable[[], Any]:
    """Returns a forward of `batch` pictures of side × side pixels."""
    side = side or context.setup.side
    if kind == "stage_a":
        setup = context.setup
        latents = torch.randn(batch, *latent_shape(kind, side), device=setup.device).to(setup.dtype)
        return lambda: program.decode(latents)
    x, r, values = forward_inputs(kind, context.setup, ROWS[kind] * batch, side)
    network = getattr(program, kind)
    if program.name in context.ours.names():
        r = r.cpu()  # as our samplers give it
    return lambda: network(x, r, **values)


def measure(context: Context) -> dict[str, Any]:
    stages: dict[str, Any] = {}
    context.ours.forget()
    for kind in CLASSES:
        tflop = context.arithmetic(kind, context.setup.side, ROWS[kind])
        stages[kind] = {"tflop": tflop, "limit_ms": context.limit_ms(tflop), "programs": {}}
    for program in context.programs():
        for kind in CLASSES:
            with context.isolated(f"forward, {TITLES[kind]}, {program.name}"):
                call = call_of(program, kind, context)
                stages[kind]["programs"][program.name] = cost(
                    call, context.setup.device, context.setup.runs, warm=min(context.setup.runs, 3)
                )
    return stages


def report(stages: dict[str, Any]) -> None:
    for kind, stage in stages.items():
        head = f"{TITLES[kind]}, {ROWS[kind]} row{'s' * (ROWS[kind] > 1)}"
        rows = [
            [name, f"{costs['ms']:.2f}", f"{costs['ms'] / stage['limit_ms']:.2f}", f"{costs['peak_gb']:.2f}"]
            for name, costs in stage["programs"].items()
        ]
        print_table([head, "ms", "of the limit", "GB beside weights"], rows)
        print(f"limit {stage['limit_ms']:.2f} ms for {stage['tflop']:.2f} TFLOP at the measured ceiling\n")
