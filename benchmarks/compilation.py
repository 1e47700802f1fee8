"""Seconds that a card's first forwards wait for kernels, compiled on demand or by processes ahead of time.

A process with an empty Triton cache makes the engines of Stage C, B and A, pauses for `--pauses` seconds, in which a
host would read files and encode text, and then calls each once at the usual shapes. Weights and inputs have arbitrary
values, and levels are two blocks deep, which needs the same kernels as whole networks. Without a card (--described)
nothing runs, and the kernels are compiled for an H200.

    python benchmarks/compilation.py [--pauses 0 2 4 8] [--dtype bf16] [--described] [--json FILE]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter

import torch

from cascade_nodes.cascade_core.engine import compilation
from cascade_nodes.cascade_core.engine.card import Card, described
from cascade_nodes.cascade_core.engine.kernels.described import compile_for
from cascade_nodes.cascade_core.engine.usual_forwards import call_as_usual, usual_engine
from cascade_nodes.cascade_core.networks.config import StageAConfig, StageBConfig, StageCConfig
from cascade_nodes.cascade_core.writing import output_file, write_file
from machine import describe_machine, print_table

STAGES = {"Stage C": StageCConfig, "Stage B": StageBConfig, "Stage A": StageAConfig}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
H200 = Card((9, 0), "NVIDIA H200", 132)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Seconds that first forwards take: kernels compiled on demand, or by processes ahead."
    )
    parser.add_argument(
        "--pauses", type=float, nargs="+", default=[0, 2, 4, 8], help="seconds before the first forward"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--described", action="store_true", help="without a card: compile for an H200")
    parser.add_argument("--json", type=output_file, help="also write all times to this file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        sys.stdout.write(json.dumps(first_forwards(arguments)))
        return
    runs = [("by themselves", 0.0, "0"), *(("beside", pause, "1") for pause in arguments.pauses)]
    results = [measured(way, pause, switch) for way, pause, switch in runs]
    head = ["compiled", "pause", *STAGES, "together", "compiled by the forwards"]
    rows = [
        [r["way"], f"{r['pause']:g} s", *(f"{r[stage]:.2f} s" for stage in STAGES), f"{r['together']:.2f} s",
         str(r["compiled"])]
        for r in results
    ]  # fmt: skip
    print_table(head, rows)
    if arguments.json:
        report = {"machine": describe_machine(), "results": results}
        write_file(arguments.json, json.dumps(report, indent=1).encode())


def measured(way: str, pause: float, switch: str) -> dict:
    with tempfile.TemporaryDirectory() as cache:
        program = [sys.executable, *sys.argv, "--child", "--pauses", str(pause)]
        environment = {**os.environ, "TRITON_CACHE_DIR": cache, compilation.SWITCH: switch}
        result = subprocess.run(
            program, stdout=subprocess.PIPE, encoding="utf-8", check=True, env=environment
        )
    times = json.loads(result.stdout)
    return {"way": way, "pause": pause, **times, "together": sum(times[stage] for stage in STAGES)}


def first_forwards(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of each stage's first forward, and the number of kernels missing in the cache."""
    import triton

    compilation.CORES = 1  # so that processes are started on small machines too
    counted: Counter[bool] = Counter()
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: counted.update([cache_hit])  # type: ignore[assignment]
    device = torch.device("meta") if arguments.described else torch.device("cuda", 0)
    dtype, times = DTYPES[arguments.dtype], {}
    if not arguments.described:
        product = torch.ones(16, 16, device=device, dtype=dtype)
        product.mm(product)  # excludes the initialisation of CUDA and cuBLAS
        torch.cuda.synchronize()
    engines = {name: usual_engine(config(), dtype, device=device) for name, config in STAGES.items()}
    with described(H200):
        for engine in engines.values():
            engine.compile_in_background(device)
    time.sleep(arguments.pauses[0])
    for name, engine in engines.items():
        before = time.perf_counter()
        if arguments.described:
            compile_for(H200, lambda engine=engine: call_as_usual(engine, dtype))
        else:
            call_as_usual(engine, dtype)
            torch.cuda.synchronize()
        times[name] = time.perf_counter() - before
    return {**times, "compiled": counted[False]}


if __name__ == "__main__":
    main()
