"""The first picture of a process whose weights are loaded: with no kernel compiled yet, and with all of them."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import Bench
from loop import Picture
from machine import print_table
from networks import CLASSES
from programs.ours import ENGINE
from timing import clean, seconds, synchronise

PROGRAM = Path(__file__).parents[1] / "gpu.py"
FLAG = "--first-picture"
NAMES = {"cold": "kernels compiled and graphs recorded", "warm": "kernels compiled before"}


def measure(bench: Bench) -> dict[str, Any]:
    """Each in a process of its own; both share a cache of kernels that is empty at first."""
    clean(bench.setup.device)
    with tempfile.TemporaryDirectory(prefix="cascade_kernels_") as cache:
        return {name: _in_new_process(bench, cache) for name in NAMES}


def _in_new_process(bench: Bench, cache: str) -> dict[str, float]:
    command = [sys.executable, str(PROGRAM), FLAG, *(["--toy"] if bench.tiny else [])]
    environment = {**os.environ, "TRITON_CACHE_DIR": cache}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"the first picture ended with {finished.returncode}: {finished.stderr[-2000:]}")
    return json.loads(finished.stdout.splitlines()[-1])


def in_this_process(bench: Bench) -> dict[str, float]:
    """Seconds of the first picture and of the second, once all weights are on the device."""
    for kind in CLASSES:
        bench.ours.network(kind)
    synchronise(bench.setup.device)
    picture = Picture(bench.setup)

    def make() -> None:
        picture.make(bench.ours.program(ENGINE))

    return {"first": seconds(make, bench.setup.device), "second": seconds(make, bench.setup.device)}


def report(found: dict[str, Any]) -> None:
    rows = [[NAMES[name], f"{of['first']:.2f}", f"{of['second']:.2f}"] for name, of in found.items()]
    print_table(["in a new process, from loaded weights", "first picture, s", "second"], rows)
