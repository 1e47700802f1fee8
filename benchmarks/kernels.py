"""Error and speed of every kernel of the engine, against float32 and the card's limits.

Kernels run on random bfloat16 tensors, at the sizes of a 1024 × 1024 picture and at sizes that fill no tile. The error
is |value − expected| / |expected| over all numbers, against float32 arithmetic on the same inputs: if it exceeds the
bound, the program reports it and exits with 1. Times are medians, `cold` with a flushed L2 cache, `warm` as one of
many calls in a CUDA graph, as in a network. The column `beside` is the cold time of a reference: a copy of the bytes
that the kernel has to read and write at least; for attention, PyTorch's on concatenated keys; for a product,
PyTorch's followed by separate kernels.

    python benchmarks/kernels.py [--only NAME] [--sweep] [--json FILE]
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from triton import testing
from triton.runtime.errors import OutOfResources

from cascade_nodes.cascade_core.engine.kernels import products
from cascade_nodes.cascade_core.writing import output_file, write_file
from kernel_cases import Case, Draw, cases, sweep
from machine import describe_machine, print_table
from product_cases import Operands
from product_cases import cases as product_cases
from timing import relative_error

BOUND = 4e-3  # bfloat16 rounds with 1.7e-3; some kernels round twice
COPY_BYTES = 1 << 30  # of the copy that is the ceiling


def microseconds(call: Callable[[], Any]) -> dict[str, float]:
    return {
        "cold": 1000 * testing.do_bench(call, return_mode="median"),
        "warm": 1000 * testing.do_bench_cudagraph(call, return_mode="median"),
    }


def copy_microseconds(traffic: int) -> float:
    """Time of reading half of this many bytes and writing the other half, cold."""
    source = torch.empty(traffic // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 1000 * testing.do_bench(lambda: target.copy_(source), return_mode="median")


def measure(case: Case) -> dict[str, Any]:
    error = max(relative_error(value, expected) for value, expected in case.check())
    row = {"kernel": case.kernel, "size": case.level.size, "error": error, **microseconds(case.call)}
    row["gb_s"] = case.traffic / row["cold"] / 1000
    row["beside"] = copy_microseconds(case.traffic)
    if case.operations:
        row["tflops"] = case.operations / row["warm"] / 1e6
    if case.rival:
        row["pytorch"] = microseconds(case.rival)
    if case.operations:
        row["beside"] = row["pytorch"]["cold"]
    return row


def measure_product(case: Any) -> dict[str, Any]:
    """Measures the engine's choice with cold weights, since in a network they are never in the cache."""
    operands = Operands(case)
    config = products.choose(case.op, case.m, case.n, case.k, "cuda")
    call = operands.fused(config) if config else operands.single_launch() or operands.separate()
    row = {"kernel": case.op, "size": case.size, "error": operands.error(call)}
    row["cold"] = row["warm"] = operands.microseconds(call)
    row["tflops"] = 2 * case.m * case.n * case.k / row["cold"] / 1e6
    return {**row, "beside": operands.microseconds(operands.separate())}


def run(only: str, swept: bool) -> dict[str, Any]:
    torch.backends.cudnn.allow_tf32 = False  # the expected values are float32's
    rows: list[dict[str, Any]] = []
    draw = Draw("cuda", torch.bfloat16)
    for case in sweep(draw) if swept else cases(draw):
        if only in case.kernel:
            try:
                rows.append(measure(case))
            except OutOfResources:  # some configurations need more resources than the card has
                if not swept:
                    raise
        del case  # its tensors
        gc.collect()
    for case in () if swept else product_cases():
        if only in case.op:
            rows.append(measure_product(case))
    return {
        "machine": describe_machine(),
        "device": torch.cuda.get_device_name(),
        "copy_gb_s": COPY_BYTES / copy_microseconds(COPY_BYTES) / 1000,
        "rows": rows,
    }


def report(results: dict[str, Any]) -> None:
    print(f"{results['machine']}, {results['device']}; a copy of 0.5 GiB: {results['copy_gb_s']:.0f} GB/s\n")
    head = ["kernel", "size", "error", "cold µs", "warm µs", "GB/s", "TFLOP/s", "beside µs", "of it"]
    print_table(head, [cells(row) for row in results["rows"]])


def cells(row: dict[str, Any]) -> list[str]:
    return [
        row["kernel"],
        row["size"],
        f"{row['error']:.1e}",
        f"{row['cold']:.1f}",
        f"{row['warm']:.1f}",
        f"{row['gb_s']:.0f}" if "gb_s" in row else "",
        f"{row['tflops']:.0f}" if "tflops" in row else "",
        f"{row['beside']:.1f}",
        f"{row['beside'] / row['cold']:.0%}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--sweep", action="store_true", help="all configurations of attention and depthwise")
    parser.add_argument("--json", type=output_file, help="also write the numbers to this file")
    arguments = parser.parse_args()
    results = run(arguments.only, arguments.sweep)
    report(results)
    if arguments.json:
        write_file(arguments.json, json.dumps(results, indent=2) + "\n")
    wrong = [row for row in results["rows"] if not row["error"] < BOUND]
    for row in wrong:
        print(f"{row['kernel']} at {row['size']} is off by {row['error']:.1e}, more than {BOUND:.0e}.")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
