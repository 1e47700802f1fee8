"""Cost against size and batch: forwards of the engine, and what they add up to for whole pictures."""

from typing import Any

import torch

from bench import Bench
from machine import print_table
from networks import CLASSES
from parts.forward import ROWS, call_of
from programs.ours import ENGINE
from timing import cost

LONG_TFLOP = 60  # beyond it fewer runs do


def measure(bench: Bench) -> dict[str, Any]:
    setup = bench.setup
    single = [(side, 1) for side in setup.sides]
    batches = [(setup.side, batch) for batch in setup.batches if batch > 1]
    return {"points": [_point(bench, side, batch) for side, batch in single + batches]}


def _point(bench: Bench, side: int, batch: int) -> dict[str, Any]:
    """Of so many pictures at once: ms and GB of each stage's forward, seconds of all of them, the same at the limit."""
    setup, program = bench.setup, bench.ours.program(ENGINE)
    bench.ours.forget()
    point: dict[str, Any] = {"side": side, "batch": batch}
    for kind in CLASSES:
        tflop = bench.arithmetic(kind, side, ROWS[kind] * batch)
        runs = max(setup.runs // (5 if tflop > LONG_TFLOP else 2), 1)
        try:
            of = cost(call_of(program, kind, bench, side, batch), setup.device, runs, warm=2)
        except torch.OutOfMemoryError:
            return {**point, "error": f"{kind}: out of memory"}
        point[kind] = {**of, "limit_ms": bench.limit_ms(tflop)}
    steps = (*setup.steps, 1)
    for name in ("ms", "limit_ms"):
        total = sum(count * point[kind][name] for count, kind in zip(steps, CLASSES, strict=True))
        point["seconds" if name == "ms" else "limit"] = total / 1000
    return point


def report(found: dict[str, Any]) -> None:
    rows = []
    for point in found["points"]:
        title = f"{point['batch']} × {point['side']}²"
        if "error" in point:
            rows.append([title, point["error"], *[""] * 5])
            continue
        stages = [f"{point[kind]['ms']:.2f}" for kind in CLASSES]
        memory = max(point[kind]["peak_gb"] for kind in CLASSES)
        whole, limit = point["seconds"], point["limit"]
        rows.append(
            [title, *stages, f"{memory:.2f}", f"{whole / point['batch']:.3f}", f"{whole / limit:.2f}"]
        )
    head = ["pictures", "Stage C ms", "Stage B ms", "Stage A ms", "GB beside weights", "s a picture"]
    print_table([*head, "of the limit"], rows)
