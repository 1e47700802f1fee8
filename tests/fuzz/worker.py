"""Tries cases by their seeds, within bounds of memory and time; a JSON line before and after each.

python -m cascade_nodes.tests.fuzz.worker graphs 123
python -m cascade_nodes.tests.fuzz.worker graphs:20 files:20 0      each kind in a fork of one process
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import importlib
import json
import logging
import os
import random
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from cascade_nodes.tests.fuzz.verdict import Outcome, judge

ADDRESS_SPACE = 8 << 30  # bytes; what a process has after torch was imported is a part of it
PEAK = 1 << 30  # bytes that one case may take beyond what the process held before
WATCHDOG = 200.0  # seconds in which no case is near its end


def main() -> None:
    parser = argparse.ArgumentParser(description="Tries cases by their seeds.")
    parser.add_argument("kinds", nargs="+", metavar="KIND[:COUNT]", help="such as graphs, or graphs:100")
    parser.add_argument("first", type=int, help="the first case's seed")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")  # a case's own output goes to standard error
    os.dup2(2, 1)
    counts = {kind: int(count or 1) for kind, _, count in (text.partition(":") for text in options.kinds)}
    modules = {kind: importlib.import_module(f"cascade_nodes.tests.fuzz.{kind}") for kind in counts}
    for kind, count in counts.items():
        if len(counts) == 1 or os.fork() == 0:
            with tempfile.TemporaryDirectory() as folder:
                os.chdir(folder)
                try_cases(
                    kind,
                    modules[kind].World(Path(folder)),
                    range(options.first, options.first + count),
                    answers,
                )
            if len(counts) > 1:
                os._exit(0)
        else:
            os.wait()


def try_cases(kind: str, world: Any, seeds: Iterable[int], answers: IO[str]) -> None:
    for seed in seeds:
        print(json.dumps({"begun": seed}), file=answers, flush=True)
        begun = time.process_time()
        outcome = attempt(world, seed)
        seconds = round(time.process_time() - begun, 2)
        answer = {
            "kind": kind,
            "seed": seed,
            "message": outcome.message,
            "fault": outcome.fault,
            "seconds": seconds,
        }
        print(json.dumps(answer), file=answers, flush=True)


def attempt(world: Any, seed: int) -> Outcome:
    """Tries one case: a hang ends the process, with a traceback; memory beyond the bound is a fault."""
    faulthandler.dump_traceback_later(WATCHDOG, exit=True)
    before = reset_peak()
    outcome = judge(lambda: world.attempt(random.Random(seed)))
    grown = memory("VmHWM") - before
    faulthandler.cancel_dump_traceback_later()
    if outcome.fault is None and grown > PEAK:
        return Outcome(outcome.message, f"{grown / 1e9:.1f} GB of memory")
    return outcome


def reset_peak() -> int:
    """Bytes that the process holds, from which its peak is counted anew."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {name}")


if __name__ == "__main__":
    sys.exit(main())
