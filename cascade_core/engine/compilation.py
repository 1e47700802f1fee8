"""Compiles a network's kernels in a process beside this one, while its file is read and the text is encoded.

For the first picture on a card, Triton spends some seconds compiling a network's kernels, mostly under Python's lock,
so that more threads do not help. So as soon as a network is made, a process of its own starts compiling its kernels
into Triton's cache on disk, where the first forward finds them. That process sees no card, since a context would take
the card's memory; it gets a description of the card (`card.py`), and runs usual forwards on the meta device
(`usual_forwards.py`).

It can only save time: it is not started where it could not help, it ends with this process, and kernels that it fails
to compile are compiled by the first forward, as without it.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..networks.precision import compute_dtype
from ..placement.pinned import available_bytes
from . import operations
from .backend import Precision, operations_on
from .card import card_of

SWITCH = "CASCADE_COMPILE_AHEAD"  # of the environment: "0" starts no processes
CORES = 4  # the fewest of a machine that has some to spare
MEMORY = 4 * 2**30  # bytes of main memory that have to be free; a process takes less than one
LONGEST = 10  # seconds that a forward waits for a process before it compiles by itself
PROCESS = """
import sys, types
core = types.ModuleType("cascade_core")  # whatever the package is called here, and without its front door
core.__path__ = [sys.argv[1]]
sys.modules["cascade_core"] = core
from cascade_core.engine.compilation_process import main
main(sys.argv[2])
"""


class Compilation:
    """A running process that compiles a network's kernels.  order: argument of `compilation_process.main`"""

    def __init__(self, order: dict[str, Any]):
        # On Windows alone; elsewhere the process sets its own niceness.
        below_normal = getattr(subprocess, "BELOW_NORMAL_PRIORITY_CLASS", 0)
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(Path(__file__).parents[1]), json.dumps(order)],
            stdin=subprocess.PIPE,  # never written to; the process ends when it closes, also with this one
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
            creationflags=below_normal | getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
        self._has_begun = threading.Event()
        threading.Thread(target=self._watch, name="cascade-compilation", daemon=True).start()

    def _watch(self) -> None:
        assert self._process.stdout is not None
        if self._process.stdout.read(1):
            self._has_begun.set()
        self._process.stdout.read()
        self._process.wait()

    def __deepcopy__(self, memo: dict[int, Any]) -> Compilation:
        """A copy of a network waits for the same process."""
        return self

    def finish(self) -> None:
        """Waits for the process if it has begun to compile, and kills it if it is still starting up: then compiling
        here is done sooner.
        """
        if self._has_begun.is_set():
            try:
                self._process.wait(LONGEST)
                return
            except subprocess.TimeoutExpired:
                pass
        self._process.kill()


def begin(network: Any, device: torch.device, precision: Precision = "exact") -> Compilation | None:
    """Begins to compile the kernels of a network's forwards on a device; None where this would gain nothing."""
    card, dtype = card_of(device), compute_dtype(network)
    if card is None or operations_on(device, precision) is operations:
        return None
    directory = cache_directory()
    if directory is None or not _can_start() or dtype not in (torch.bfloat16, torch.float16):
        return None
    order = {
        "config": [type(network.config).__name__, asdict(network.config)],
        "dtype": str(dtype).removeprefix("torch."),
        "precision": precision,
        "card": card,
    }
    order["marker"] = str(directory / f"cascade-{_digest(order)}")
    if Path(order["marker"]).exists():
        return None
    try:
        return Compilation(order)
    except OSError:
        return None


def cache_directory() -> Path | None:
    """Triton's cache on disk, or None in versions that cannot compile ahead."""
    import triton

    if not hasattr(triton, "AsyncCompileMode"):
        return None
    return Path(triton.knobs.cache.dir)


def _can_start() -> bool:
    free = available_bytes()
    return (
        os.environ.get(SWITCH) != "0"
        and bool(sys.executable)
        and not getattr(sys, "frozen", False)  # the executable is an application, not Python
        and (os.cpu_count() or 1) >= CORES
        and (free is None or free >= MEMORY)
    )


def _digest(order: dict[str, Any]) -> str:
    """Digest of everything that the kernels depend on; when it changes, they are compiled again."""
    digest = hashlib.sha256(json.dumps([order, version("triton"), torch.__version__]).encode())
    engine = Path(__file__).parent
    for path in sorted([*engine.rglob("*.py"), *engine.glob("*.json")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()
