"""One process that tries cases of a kind by their seeds, within bounds of memory and time.

python -m cascade_nodes.tests.fuzz.worker graphs 123        one case, told in words
python -m cascade_nodes.tests.fuzz.worker graphs 0 --count 500   as the tests do it: a JSON line for each
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
from pathlib import Path

from cascade_nodes.tests.fuzz.verdict import Outcome, judge

ADDRESS_SPACE = 8 << 30  # bytes; what a process has after torch was imported is a part of it
PEAK = 1 << 30  # bytes that one case may take beyond what the process held before
WATCHDOG = 120.0  # seconds in which no case is near its end


def main() -> None:
    parser = argparse.ArgumentParser(description="Tries cases by their seeds.")
    parser.add_argument("kind")
    parser.add_argument("first", type=int, help="the first case's seed")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where the cases may work, default: a temporary one")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")  # a case's own output goes to standard error
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        os.chdir(folder)
        module = importlib.import_module(f"cascade_nodes.tests.fuzz.{options.kind}")
        world = module.World(folder)
        for seed in range(options.first, options.first + options.count):
            print(json.dumps({"begun": seed}), file=answers, flush=True)
            begun = time.process_time()
            outcome = attempt(world, seed)
            seconds = round(time.process_time() - begun, 2)
            answer = {"seed": seed, "message": outcome.message, "fault": outcome.fault, "seconds": seconds}
            print(json.dumps(answer), file=answers, flush=True)


def attempt(world, seed: int) -> Outcome:
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
