"""First forwards whose kernels were compiled in a process beside: how many are found, how many compiled anew.

    python -m cascade_nodes.tests.engine.compiled_in_background StageAConfig [--card]

A program of its own, as `compiled_kernels.py` is. On a card that is described, or (--card) on the one that is here,
where weights and inputs are of any values. Prints JSON.
"""

import argparse
import json
import os
import sys

import torch
import triton

from cascade_nodes.cascade_core.engine import compilation
from cascade_nodes.cascade_core.engine.card import Card, described
from cascade_nodes.cascade_core.engine.kernels.described import compile_for
from cascade_nodes.cascade_core.engine.usual_forwards import call_as_usual, usual_engine
from cascade_nodes.cascade_core.networks import config as configurations

CARD = Card((8, 6), "NVIDIA GeForce RTX 3060", 28)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--card", action="store_true")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--precision", default="exact")
    arguments = parser.parse_args()
    device = torch.device("cuda", 0) if arguments.card else torch.device("meta")
    os.cpu_count = lambda: compilation.CORES
    compilation.LONGEST = 600  # seconds: a busy machine takes longer, and this is about what is found
    hits: list[bool] = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)  # type: ignore[assignment]
    dtype = DTYPES[arguments.dtype]
    config = getattr(configurations, arguments.config)()
    engine = usual_engine(config, dtype, arguments.precision, device)
    with described(CARD):
        engine.compile_in_background(device)
    running = engine._compilation
    assert running is not None
    running._has_begun.wait()
    if arguments.card:
        call_as_usual(engine, dtype)
        torch.cuda.synchronize()
    else:
        compile_for(CARD, lambda: call_as_usual(engine, dtype))
    with described(CARD):
        engine.compile_in_background(device)
    report = {
        "found": hits.count(True),
        "compiled": hits.count(False),
        "again": engine._compilation is not None,
    }
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main()
