"""The fastest way to compute each matrix product on this card; writes the engine's table of winners.

Every product with a fused kernel in the published networks at 1024 × 1024, batch 2, is timed with that kernel in
every sensible configuration, and as PyTorch's product followed by separate kernels (up to the response norm, in one
launch if it fits). A call is one of many in a CUDA graph, each with its own weights, since in a network a weight is
never in the cache when it is needed. A configuration that is slower, or whose error exceeds rounding, is not chosen.

    python benchmarks/tune_products.py [--table FILE] [--json FILE]
"""

import argparse
import json
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from cascade_nodes.cascade_core.engine.card import card_of
from cascade_nodes.cascade_core.engine.kernels.tuned import CUBLAS, TABLE, Config, device_key
from cascade_nodes.cascade_core.writing import output_file, write_file
from machine import describe_machine, print_table
from product_cases import Case, Operands, cases

TOLERANCE = 4e-3  # of bfloat16 results, relative, all numbers together


def candidates() -> list[Config]:
    """Candidates: tiles of 128 × 256 for two warp groups, half of that for one, smaller ones for few rows."""
    k = 64  # 128 bytes: the swizzle of shared memory
    large = [Config(128, 256, k), Config(128, 256, k, tma=True), Config(256, 128, k, tma=True)]
    large += [Config(128, 256, k, schedule="loop", tma=True), Config(128, 256, k, stages=4, tma=True)]
    half = [Config(128, 128, k, warps=4), Config(128, 128, k, warps=4, tma=True)]
    half += [Config(64, 256, k, warps=4, tma=True), Config(128, 128, k, stages=4, tma=True)]
    half += [Config(128, 128, k, warps=4, schedule="loop", tma=True, per_sm=2)]
    small = [Config(64, 128, k, warps=4, stages=4, tma=True), Config(128, 64, k, warps=4, stages=4, tma=True)]
    return [*large, *half, *small]


def compile_kernels(jobs: list[tuple[Case, Config]]) -> None:
    """Compiles kernels into Triton's cache on disk by running each once."""
    for case, config in jobs:
        try:
            Operands(case, copies=1).fused(config)(0)
        except OutOfResources:  # `measure` leaves it out
            continue
    torch.cuda.synchronize()


def compile_all(pairs: Iterable[tuple[Case, Config]]) -> None:
    """Compiles in one process per core, each one kernel at a time."""
    jobs = list({case.kernel(config): (case, config) for case, config in pairs}.values())
    workers = min(os.cpu_count() or 1, 16)
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        list(pool.map(compile_kernels, [jobs[i::workers] for i in range(workers)]))


def measure(case: Case, configs: list[Config]) -> dict[str, Any]:
    operands = Operands(case)
    tried = []
    for config in configs:
        try:
            call = operands.fused(config)
            tried.append({"config": asdict(config), "error": operands.error(call)})
            tried[-1]["us"] = operands.microseconds(call)
        except OutOfResources:  # more shared memory than the card has
            continue
    result = {"op": case.op, "size": case.size, "count": case.count, "tried": tried}
    result["separate"] = {"us": operands.microseconds(operands.separate())}
    single_launch = operands.single_launch()
    result["single_launch"] = {"us": operands.microseconds(single_launch)} if single_launch else None
    correct = [entry for entry in tried if "us" in entry and entry["error"] < TOLERANCE]
    best = min(correct, key=lambda entry: entry["us"], default=None)
    result["best"] = best
    result["winner"] = best["config"] if best and best["us"] < unfused(result) else CUBLAS
    return result


def unfused(result: dict[str, Any]) -> float:
    """Microseconds of the faster way with PyTorch's product."""
    return min(way["us"] for way in (result["separate"], result["single_launch"]) if way)


def write_table(path: Path, device: str, results: list[dict[str, Any]]) -> None:
    """Replaces the entries that were measured and keeps the others."""
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for result in results:
        table.setdefault(device, {}).setdefault(result["op"], {})[result["size"]] = result["winner"]
    write_file(path, json.dumps(table, indent=1, sort_keys=True) + "\n")


def describe(config: dict[str, Any] | None) -> str:
    if config is None:
        return "none"
    tile = "×".join(str(config[f"block_{axis}"]) for axis in "mnk")
    tma = " tma" if config["tma"] else ""
    return f"{config['schedule']} {tile} {config['warps']}w {config['stages']}s {config['per_sm']}p{tma}"


def row(result: dict[str, Any]) -> list[str]:
    m, n, k = map(int, result["size"].split("x"))
    without, best = unfused(result), result["best"]
    fused = best["us"] if best else float("nan")
    name = f"{result['op']} {m}×{n}×{k}"
    rates = [f"{2e-6 * m * n * k / us:.0f}" for us in (without, fused)]
    wrong = sum(entry["error"] >= TOLERANCE for entry in result["tried"])
    config = describe(best and best["config"]) + (f", {wrong} wrong" if wrong else "")
    return [
        name,
        str(result["count"]),
        f"{without:.1f}",
        f"{fused:.1f}",
        *rates,
        f"{without / fused:.2f}",
        config,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Times every matrix product, and writes the table of winners."
    )
    parser.add_argument("--table", type=Path, default=TABLE, help="file of winners to update")
    parser.add_argument("--json", type=output_file, help="also write all times to this file")
    arguments = parser.parse_args()
    card = card_of(torch.device("cuda"))
    assert card is not None, "Products are tuned on an NVIDIA card, with Triton."
    configs, measured = candidates(), cases()
    compile_all((case, config) for case in measured for config in configs)
    results = [measure(case, configs) for case in measured]
    write_table(arguments.table, device_key(card), results)
    if arguments.json:
        report = {"machine": describe_machine(), "device": torch.cuda.get_device_name(), "results": results}
        write_file(arguments.json, json.dumps(report, indent=1))
    head = ["product", "times", "unfused µs", "fused µs", "TFLOP/s", "fused", "gain", "fastest"]
    print_table(head, [row(result) for result in results])
    before = sum(result["count"] * unfused(result) for result in results)
    saved = sum(r["count"] * (unfused(r) - r["best"]["us"]) for r in results if r["winner"] != CUBLAS)
    print(f"All of them: {before / 1000:.2f} ms unfused, {(before - saved) / 1000:.2f} ms at best.")


if __name__ == "__main__":
    main()
