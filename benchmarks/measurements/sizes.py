"""Cost against size and batch: forwards of the engine, and what they add up to for whole pictures."""

from typing import Any

import torch

from context import Context
from machine import print_table
from measurements.forward import ROWS, call_of
from networks import CLASSES
from programs.ours import ENGINE
from timing import cost

LONG_TFLOP = 60  # above it fewer runs are enough


def measure(context: Context) -> dict[str, Any]:
    setup = context.setup
    single = [(side, 1) for side in setup.sides]
    batches = [(setup.side, batch) for batch in setup.batches if batch > 1]
    return {"points": [_point(context, side, batch) for side, batch in single + batches]}


def _point(context: Context, side: int, batch: int) -> dict[str, Any]:
    """Measures `batch` pictures at once: ms and GB of each stage's forward, total seconds, and those at the limit."""
    setup, program = context.setup, context.ours.program(ENGINE)
    context.ours.forget()
    point: dict[str, Any] = {"side": side, "batch": batch}
    for kind in CLASSES:
        tflop = context.arithmetic(kind, side, ROWS[kind] * batch)
        runs = max(setup.runs // (5 if tflop > LONG_TFLOP else 2), 1)
        try:
            costs = cost(call_of(program, kind, context, side, batch), setup.device, runs, warm=2)
        except torch.OutOfMemoryError:
            return {**point, "error": f"{kind}: out of memory"}
        point[kind] = {**costs, "limit_ms": context.limit_ms(tflop)}
    steps = (*setup.steps, 1)
    for name in ("ms", "limit_ms"):
        total = sum(count * point[kind][name] for count, kind in zip(steps, CLASSES, strict=True))
        point["seconds" if name == "ms" else "limit"] = total / 1000
    return point


def report(results: dict[str, Any]) -> None:
    rows = []
    for point in results["points"]:
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
