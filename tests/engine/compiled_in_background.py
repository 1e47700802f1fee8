"""A first picture's Stage A on a described card, with its kernels compiled in the background: how many are found.

A program of its own, as `compiled_kernels.py` is. Prints JSON.
"""

import json
import os
import sys
import threading

import torch
import triton

from cascade_nodes.cascade_core.engine import compilation
from cascade_nodes.cascade_core.engine.card import Card, described
from cascade_nodes.cascade_core.engine.kernels.described import compile_for
from cascade_nodes.cascade_core.engine.vqgan import DecoderEngine
from cascade_nodes.cascade_core.networks.config import StageAConfig
from cascade_nodes.cascade_core.networks.stage_a import StageA

CARD = Card((8, 6), "NVIDIA GeForce RTX 3060", 28)


def main() -> None:
    os.cpu_count = lambda: compilation.CORES
    hits: list[bool] = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)  # type: ignore[assignment]
    meta = torch.device("meta")
    with meta:
        network = StageA(StageAConfig()).to(torch.bfloat16).requires_grad_(False).eval()
    engine = DecoderEngine(network)
    with described(CARD):
        engine.compile_in_background(meta)
        running = engine._compilation
        assert running is not None
        running._has_begun.wait()
    compile_for(CARD, lambda: engine(torch.empty(1, 4, 256, 256, dtype=torch.bfloat16, device=meta)))
    with described(CARD):
        again = compilation.begin(network, meta)
    report = {
        "found": hits.count(True),
        "compiled": hits.count(False),
        "again": again is not None,
        "threads": [thread.name for thread in threading.enumerate() if thread.name.startswith("cascade")],
    }
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main()
