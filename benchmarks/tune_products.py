"""Which way each matrix product of Stage C and Stage B is fastest on this card; writes the engine's table of winners.

Every product of the published networks at 1024 × 1024, batch 2, is timed as PyTorch computes it, with the kernels that
it needs around it, and as the engine's fused kernels do in every configuration worth trying. A call is one of many in
a CUDA graph, each with weights of its own, since in a network no weight is in the cache when its turn comes. What is
slower, or wrong by more than rounding, is not chosen.

    python benchmarks/tune_products.py [--fp8] [--table FILE] [--json FILE]
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

from cascade_nodes.cascade_core.engine.kernels.tuned import CUBLAS, TABLE, Config, device_key
from machine import describe_machine, print_table
from product_cases import Case, Operands, cases

TOLERANCE = 4e-3  # of bfloat16 results, relative, all numbers together


def candidates(quantised: bool) -> list[Config]:
    """Tiles of 128 × 256 for two warp groups, of half that for one; smaller ones where there are few rows."""
    k = 128 if quantised else 64  # 128 bytes: what shared memory is swizzled by
    large = [Config(128, 256, k), Config(128, 256, k, tma=True), Config(256, 128, k, tma=True)]
    large += [Config(128, 256, k, schedule="loop", tma=True), Config(128, 256, k, stages=4, tma=True)]
    half = [Config(128, 128, k, warps=4), Config(128, 128, k, warps=4, tma=True)]
    half += [Config(64, 256, k, warps=4, tma=True), Config(128, 128, k, stages=4, tma=True)]
    half += [Config(128, 128, k, warps=4, schedule="loop", tma=True, per_sm=2)]
    small = [Config(64, 128, k, warps=4, stages=4, tma=True), Config(128, 64, k, warps=4, stages=4, tma=True)]
    return [*large, *half, *small]


def compile_kernels(jobs: list[tuple[Case, Config]]) -> None:
    """Into Triton's cache on disk, by running each once."""
    for case, config in jobs:
        try:
            Operands(case, copies=1).fused(config)(0)
        except OutOfResources:  # it is left out when its turn comes to be measured
            continue
    torch.cuda.synchronize()


def compile_all(pairs: Iterable[tuple[Case, Config]]) -> None:
    """In as many processes as there are processors: Python compiles one kernel at a time in each."""
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
    apart = operands.apart()
    result = {"op": case.op, "size": case.size, "count": case.count, "tried": tried}
    result["apart"] = {"us": operands.microseconds(apart)}
    between = operands.around_resident()
    result["resident"] = {"us": operands.microseconds(between)} if between else None
    right = [entry for entry in tried if "us" in entry and entry["error"] < TOLERANCE]
    best = min(right, key=lambda entry: entry["us"], default=None)
    result["best"] = best
    result["winner"] = best["config"] if best and best["us"] < result["apart"]["us"] else CUBLAS
    return result


def prefer_resident(results: list[dict[str, Any]]) -> None:
    """No product is fused where both of a block with the whole norm in one launch between them take less time."""
    for first in (r for r in results if r["op"] == "linear_gelu_response"):
        m, n, k = first["size"].split("x")
        second = next(r for r in results if r["op"] == "scaled_linear_add" and r["size"] == f"{m}x{k}x{n}")
        pair = first, second
        if first["resident"] is None:
            continue
        fused = sum(min(r["apart"]["us"], r["best"]["us"] if r["best"] else float("inf")) for r in pair)
        if sum(r["resident"]["us"] for r in pair) < fused:
            for r in pair:
                r["winner"], r["apart"] = CUBLAS, r["resident"]


def write_table(path: Path, device: str, results: list[dict[str, Any]]) -> None:
    """Replaces what has been measured, keeps the rest."""
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for result in results:
        table.setdefault(device, {}).setdefault(result["op"], {})[result["size"]] = result["winner"]
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)


def describe(config: dict[str, Any] | None) -> str:
    if config is None:
        return "none"
    tile = "×".join(str(config[f"block_{axis}"]) for axis in "mnk")
    tma = " tma" if config["tma"] else ""
    return f"{config['schedule']} {tile} {config['warps']}w {config['stages']}s {config['per_sm']}p{tma}"


def row(result: dict[str, Any]) -> list[str]:
    m, n, k = map(int, result["size"].split("x"))
    apart, best = result["apart"]["us"], result["best"]
    fused = best["us"] if best else float("nan")
    name = f"{result['op']} {m}×{n}×{k}"
    rates = [f"{2e-6 * m * n * k / us:.0f}" for us in (apart, fused)]
    wrong = sum(entry["error"] >= TOLERANCE for entry in result["tried"])
    config = describe(best and best["config"]) + (f", {wrong} wrong" if wrong else "")
    return [
        name,
        str(result["count"]),
        f"{apart:.1f}",
        f"{fused:.1f}",
        *rates,
        f"{apart / fused:.2f}",
        config,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Times every matrix product, and writes the table of winners."
    )
    parser.add_argument("--fp8", action="store_true", help="the products of e4m3 operands")
    parser.add_argument("--table", type=Path, default=TABLE, help="where the winners are written")
    parser.add_argument("--json", type=Path, help="all times")
    arguments = parser.parse_args()
    configs = candidates(arguments.fp8)
    found = cases(arguments.fp8)
    compile_all((case, config) for case in found for config in configs)
    results = [measure(case, configs) for case in found]
    prefer_resident(results)
    write_table(arguments.table, device_key(torch.device("cuda")), results)
    if arguments.json:
        report = {"machine": describe_machine(), "device": torch.cuda.get_device_name(), "results": results}
        arguments.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    head = ["product", "times", "apart µs", "fused µs", "TFLOP/s", "fused", "gain", "fastest"]
    print_table(head, [row(result) for result in results])
    before = sum(result["count"] * result["apart"]["us"] for result in results)
    saved = sum(r["count"] * (r["apart"]["us"] - r["best"]["us"]) for r in results if r["winner"] != CUBLAS)
    print(
        f"Both stages: {before / 1000:.2f} ms as PyTorch computes them, {(before - saved) / 1000:.2f} ms at best."
    )


if __name__ == "__main__":
    main()
