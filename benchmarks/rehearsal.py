"""A rehearsal of the notebook on Colab's free machine: a T4 with 15 GB, and 12.7 GB of main memory.

    python benchmarks/rehearsal.py [--folder FOLDER] [--card GB] [--main GB] [--json FILE] [--toy] [--notebook FILE]

Runs the notebook's cells, with the switch for the published weights set, in a separate process, on random weights
with the published files' names, sizes and precisions, which are first written to --folder (14 GB). The card poses as
a T4 (compute capability 7.5, so fp16) with 15 GB and provides no more; its speed is its own. Main memory counts
anonymous, pinned and shared pages; pages of mapped files, which the system may drop, are reported separately. Cells
that exceed either limit are stopped with a message. Lines that need the network are skipped and listed.

--toy: the notebook as it is committed, on the demo, without a card.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from cascade_nodes.cascade_core.checkpoints import fuse_attention, write_safetensors
from cascade_nodes.cascade_core.writing import output_file, write_file
from cascade_nodes.headless.catalogue import FILES
from cascade_nodes.headless.verify.expected import published_shapes
from machine import describe_machine, print_table
from rehearsed import Settings, main_memory

HERE = Path(__file__).resolve().parent
NOTEBOOK = HERE.parent / "notebooks" / "stable_cascade_colab.ipynb"
CARD, MAIN = 15.0, 12.7  # GB of Colab's free machine
GB = 1e9
OFTEN = 0.05  # seconds between two samples
BLOCK = (8 << 20) + 1  # values; longer than any row and not a multiple of one, so that no two rows are equal
SPREAD = 0.02
PRECISIONS = {2: torch.bfloat16, 4: torch.float32}  # of published files, by bytes of a value


def fetched(notebook: Path) -> list[str]:
    """Catalogue names of the published files that a notebook's setup fetches."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    lines = re.findall(r"!cascade fetch --to models (.*)", source)
    return [name for line in lines for name in line.split()]


def write_files(models: Path, names: list[str]) -> int:
    """Random weights of published names, shapes and precisions, tensor by tensor. Returns all files' bytes."""
    size = 0
    for name in names:
        file = FILES[name]
        path = models / file.folder / file.saved_as
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_random(path, *published_tensors(name))
        size += path.stat().st_size
    return size


def published_tensors(name: str) -> tuple[dict[str, Tensor], torch.dtype]:
    """The tensors of a published file, on the meta device, and the precision of its weights."""
    shapes = published_shapes(name)
    values = sum(map(math.prod, shapes.values()))
    dtype = PRECISIONS[round(FILES[name].size / values)]
    counters = {key for key in shapes if key.endswith("num_batches_tracked")}
    tensors = {
        key: torch.empty(shape, dtype=torch.int64 if key in counters else dtype, device="meta")
        for key, shape in shapes.items()
    }
    return fuse_attention(tensors), dtype


def write_random(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).mul_(SPREAD).to(dtype)

    def value(name: str) -> Tensor:
        shape = tensors[name].shape
        if name.endswith("running_var") or not tensors[name].is_floating_point():
            return torch.ones(shape, dtype=tensors[name].dtype)
        count, start = math.prod(shape), crc32(name.encode()) % BLOCK
        repeats = -(-(start + count) // BLOCK)
        return (block if repeats == 1 else block.repeat(repeats))[start : start + count].view(shape)

    write_safetensors(path, tensors, {}, value=value)


def descendants(pid: int) -> list[int]:
    """A process and all its running descendants."""
    found = [pid]
    for each in found:
        for children in Path(f"/proc/{each}/task").glob("*/children"):
            try:
                found += map(int, children.read_text(encoding="ascii").split())
            except OSError:  # ended meanwhile
                continue
    return found


class MemoryMonitor:
    """Watches a process's memory and ends it when it exceeds a limit. Records peaks in bytes, by cell."""

    def __init__(self, process: subprocess.Popen[Any], settings: Settings):
        self.process, self.settings = process, settings
        self.about: dict[str, Any] = {"title": "Start"}
        self.peaks: dict[str, int] = {}
        self.stopped: str | None = None
        self.ended, self.lock = threading.Event(), threading.Lock()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def enter(self, about: dict[str, Any]) -> None:
        with self.lock:
            self.about, self.peaks = about, {}

    def close(self) -> None:
        self.ended.set()
        self.thread.join()

    def _look(self) -> None:
        while not self.ended.wait(OFTEN):
            self.look()

    def look(self) -> None:
        with self.lock:
            now: dict[str, int] = {}
            for kinds in map(main_memory, descendants(self.process.pid)):
                for kind, size in kinds.items():
                    now[kind] = now.get(kind, 0) + size
            now["main"] = now.get("anonymous", 0) + now.get("shared", 0)
            if self.settings.card is not None:
                free, total = torch.cuda.mem_get_info()
                now["card"] = total - free - self.settings.held
            for kind, size in now.items():
                self.peaks[kind] = max(size, self.peaks.get(kind, 0))
            self._enforce(now)

    def _enforce(self, now: dict[str, int]) -> None:
        limits = {"main": (self.settings.main, "main memory"), "card": (self.settings.card, "the card")}
        for kind, (most, words) in limits.items():
            size = now.get(kind, 0)
            if most is not None and size > most and self.stopped is None:
                self.stopped = (
                    f"“{self.about['title']}” took {size / GB:.2f} GB of {words}, where there are {most / GB:g} GB: "
                    "the cells were stopped, as that machine would have stopped them."
                )
                for pid in reversed(descendants(self.process.pid)):
                    try:
                        os.kill(pid, 9)
                    except ProcessLookupError:
                        continue


def rehearse(settings: Settings, folder: Path) -> dict[str, Any]:
    """Runs the cells. Returns their figures, and in `failed` the reason for an early end, or None."""
    command = [sys.executable, str(HERE / "rehearsed.py"), "cells", json.dumps(asdict(settings))]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, encoding="utf-8")
    assert process.stdout is not None
    watch = MemoryMonitor(process, settings)
    cells: list[dict[str, Any]] = []
    for line in process.stdout:
        event = json.loads(line)
        if "begun" in event:
            watch.enter(event["begun"])
        else:
            watch.look()
            cell = event["ended"] | watch.peaks
            # Pages pinned by the driver, which the system does not count.
            cell["main"] += cell.get("pinned_by_torch", 0)
            cells.append(cell)
    status = process.wait()
    watch.close()
    failed = watch.stopped
    if failed is None and status:
        failed = f"“{watch.about['title']}” failed ({status}); what it said is above."
    return {"cells": cells, "failed": failed, **({"last": watch.about | watch.peaks} if failed else {})}


def report(result: dict[str, Any]) -> None:
    columns = ("allocated", "reserved", "card", "main", "anonymous", "shared", "files")
    rows = [
        [
            cell["title"],
            f"{cell['seconds']:.1f}",
            *(f"{cell[column] / GB:.2f}" if column in cell else "" for column in columns),
        ]
        for cell in result["cells"]
    ]
    head = [
        "cell",
        "seconds",
        "allocated",
        "reserved",
        "card",
        "main memory",
        "anonymous",
        "shared",
        "of files",
    ]
    print_table(head, rows)
    for line in skipped_lines(result):
        print(line)
    if result["failed"]:
        print(result["failed"])


def skipped_lines(result: dict[str, Any]) -> Iterator[str]:
    for cell in result["cells"]:
        for line in cell["skipped"]:
            yield f"left out, since it needs the network: {line}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="keep the files here")
    parser.add_argument("--card", type=float, default=CARD, help=f"GB, default: {CARD}")
    parser.add_argument("--main", type=float, default=MAIN, help=f"GB, default: {MAIN}")
    parser.add_argument("--json", type=output_file, help="also keep the numbers here")
    parser.add_argument("--toy", action="store_true", help="the demo, without a card")
    parser.add_argument("--notebook", type=Path, default=NOTEBOOK)
    return parser.parse_args()


def settings_of(options: argparse.Namespace) -> Settings:
    """Raises SystemExit where the card is not free."""
    notebook, main = str(options.notebook.resolve()), int(options.main * GB)
    if options.toy:
        return Settings(notebook, None, 0, main, published=False)
    torch.cuda.init()
    torch.zeros(1, device="cuda")
    free, total = torch.cuda.mem_get_info()  # its own context counts as held, as do other programs
    card = int(options.card * GB)
    if free < card:
        raise SystemExit(f"{free / GB:.1f} GB of the card are free, of {options.card:g} that are asked for.")
    return Settings(notebook, card, total - free, main, published=True)


def main() -> int:
    options = parse()
    settings = settings_of(options)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result: dict[str, Any] = {
            "machine": describe_machine(),
            "device": "the processor" if settings.card is None else torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "card": settings.card,
            "main": settings.main,
        }
        if settings.published:
            begun = time.perf_counter()
            result["files"] = write_files(folder / "models", fetched(options.notebook))
            result["writing"] = time.perf_counter() - begun
            print(f"{result['files'] / GB:.1f} GB of files in {result['writing']:.0f} s", flush=True)
        result |= rehearse(settings, folder)
    report(result)
    if options.json:
        write_file(options.json, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
