"""First picture of a process whose weights are loaded: before any kernel is compiled, and with all compiled."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from context import Context
from machine import print_table
from networks import CLASSES
from picture import BenchmarkPicture
from programs.ours import ENGINE
from timing import clean, seconds, synchronise

PROGRAM = Path(__file__).parents[1] / "gpu.py"
FLAG = "--first-picture"
NAMES = {"cold": "kernels compiled and graphs recorded", "warm": "kernels compiled before"}


def measure(context: Context) -> dict[str, Any]:
    """Runs each in a process of its own; both share a kernel cache that is empty at first."""
    clean(context.setup.device)
    with tempfile.TemporaryDirectory(prefix="cascade_kernels_") as cache:
        return {name: _in_new_process(context, cache) for name in NAMES}


def _in_new_process(context: Context, cache: str) -> dict[str, float]:
    command = [sys.executable, str(PROGRAM), FLAG, *(["--toy"] if context.tiny else [])]
    environment = {**os.environ, "TRITON_CACHE_DIR": cache}
    finished = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
    if finished.returncode:
        raise RuntimeError(f"the first picture ended with {finished.returncode}: {finished.stderr[-2000:]}")
    return json.loads(finished.stdout.splitlines()[-1])


def in_this_process(context: Context) -> dict[str, float]:
    """Seconds of the first picture and of the second, once all weights are on the device."""
    for kind in CLASSES:
        context.ours.network(kind)
    synchronise(context.setup.device)
    picture = BenchmarkPicture(context.setup)

    def make() -> None:
        picture.make(context.ours.program(ENGINE))

    return {"first": seconds(make, context.setup.device), "second": seconds(make, context.setup.device)}


def report(processes: dict[str, Any]) -> None:
    rows = [
        [NAMES[name], f"{times['first']:.2f}", f"{times['second']:.2f}"] for name, times in processes.items()
    ]
    print_table(["in a new process, from loaded weights", "first picture, s", "second"], rows)
