"""Time and memory of loading a full-size Stage C.

A random Stage C of 3.6 B parameters (bf16, 7.2 GB) is written once under its published names. Fresh
processes then load it through `cascade_core.checkpoints.load_model`: from a cold page cache, in turn with
plain sequential reads of the same file, and then from a warm one.

A mapped file is "loaded" in no time, because nothing has been read yet. So the time that counts runs until
a byte of every page of every weight has been touched: the whole model is in memory then, as the mapped size
shows. The kernel's own count of bytes fetched shows whether the cache was really cold. Memory is split into
private (RssAnon: copies, which only this process can give back) and mapped (RssFile: pages of the file,
which the system may drop and read again); its peak is the kernel's high-water mark of both, interpreter and
libraries included. Linux only.

    python benchmarks/load.py [--folder FOLDER] [--runs 3] [--json FILE]
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cascade_nodes.cascade_core.checkpoints import NETWORKS, fuse_attention, load_model
from cascade_nodes.cascade_core.networks.config import PRESETS
from cascade_nodes.cascade_core.writing import output_file, write_file
from machine import describe_machine, print_table

BLOCK = 16 << 20  # bytes read at a time, and elements drawn at a time
PAGE = 4096
STATUS = Path("/proc/self/status")
WATCH_SECONDS = 0.02
GB = 1e9


def write_random_checkpoint(path: Path, preset: str) -> int:
    """Streams a random bf16 checkpoint in published names, a block at a time. Returns its size in bytes."""
    kind, config = PRESETS[preset]
    with torch.device("meta"):
        weights = fuse_attention(NETWORKS[kind].from_config(config).state_dict())
    header, end = {}, 0
    for name, shape in ((name, tensor.shape) for name, tensor in weights.items()):
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + 2 * shape.numel()]}
        end += 2 * shape.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for block in random_blocks(end // 2):
            file.write(block.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return path.stat().st_size


def random_blocks(elements: int) -> Iterator[torch.Tensor]:
    """Normal bf16 values of standard deviation 0.02, in blocks."""
    generator = torch.Generator().manual_seed(0)
    while elements > 0:
        count = min(elements, BLOCK)
        yield torch.randn(count, generator=generator).mul_(0.02).bfloat16()
        elements -= count


def drop_from_cache(path: Path) -> None:
    """Asks the kernel to forget the file's pages, so that the next read comes from the disk."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_sequentially(path: Path) -> float:
    """Seconds to read the whole file once, front to back, into one reused buffer."""
    buffer = bytearray(BLOCK)
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        start = time.perf_counter()
        while file.readinto(buffer):
            pass
        return time.perf_counter() - start


def bytes_from_disk() -> int:
    """Bytes that this process made the storage layer fetch so far."""
    return _proc_value(Path("/proc/self/io"), "read_bytes")


def load_and_touch(path: Path) -> dict[str, float]:
    """Runs in the fresh process: loads, touches every page, and reports the time."""
    fetched, start = bytes_from_disk(), time.perf_counter()
    model, _, _ = load_model(path, expect="stage_c")
    loaded = time.perf_counter()
    for tensor in model.state_dict().values():
        in_memory_order = tensor.as_strided((tensor.numel(),), (1,))  # no copy, whatever the layout
        in_memory_order.view(torch.uint8)[::PAGE].sum()
    end = time.perf_counter()
    return {
        "returned": loaded - start,
        "resident": end - start,
        "from_disk": bytes_from_disk() - fetched,
        "private": _proc_value(STATUS, "RssAnon") * 1024,
        "mapped": _proc_value(STATUS, "RssFile") * 1024,
        "peak": _proc_value(STATUS, "VmHWM") * 1024,
    }


def measure_load(path: Path) -> dict[str, float]:
    """Loads in a fresh process and watches its memory from outside."""
    command = [sys.executable, __file__, "--load-only", str(path)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
    status = Path(f"/proc/{child.pid}/status")
    private = mapped = 0
    while child.poll() is None:
        try:
            private = max(private, _proc_value(status, "RssAnon") * 1024)
            mapped = max(mapped, _proc_value(status, "RssFile") * 1024)
        except (OSError, LookupError):
            break  # the process has ended between two looks
        time.sleep(WATCH_SECONDS)
    output, _ = child.communicate()
    if child.returncode:
        raise SystemExit(f"loading {path} failed with exit code {child.returncode}.")
    load = json.loads(output)
    return {**load, "private": max(private, load["private"]), "mapped": max(mapped, load["mapped"])}


def _proc_value(path: Path, key: str) -> int:
    """Number after `key:` in one of the kernel's status files."""
    for line in path.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0])
    raise LookupError(f"{path} has no {key}.")


def run(folder: Path, preset: str, runs: int) -> dict[str, Any]:
    """Runs all measurements on one file, which is removed afterwards."""
    place = Path(tempfile.mkdtemp(prefix="cascade_load_", dir=folder))
    try:
        path = place / f"{preset}_random.safetensors"
        size = write_random_checkpoint(path, preset)
        disk, cold = [], []
        for _ in range(runs):  # in turn, because a shared disk's speed drifts
            drop_from_cache(path)
            read_sequentially(path)  # not counted: it brings memory into the same state for both
            drop_from_cache(path)
            disk.append(size / read_sequentially(path))
            drop_from_cache(path)
            cold.append(measure_load(path))
        warm = [measure_load(path) for _ in range(runs)]
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return {
        "machine": describe_machine(),
        "preset": preset,
        "size": size,
        "disk": disk,
        "cold": cold,
        "warm": warm,
    }


def summarise(results: dict[str, Any]) -> dict[str, float]:
    """Promised figures: peak over size (worst run), cold load over the disk read before it (median)."""
    size, disk, cold = results["size"], results["disk"], results["cold"]
    ratios = [size / load["resident"] / speed for load, speed in zip(cold, disk, strict=True)]
    return {
        "peak_over_size": max(load["peak"] for load in cold + results["warm"]) / size,
        "load_over_disk": statistics.median(ratios),
    }


def report(results: dict[str, Any]) -> None:
    """Prints the table and the two figures."""
    size = results["size"]
    print(f"{results['machine']}\n{results['preset']}, bf16, {size / GB:.2f} GB\n")
    head = ["", "returned s", "resident s", "GB/s", "from disk GB", "private GB", "mapped GB", "peak / size"]
    disk = [
        ["disk, sequential", "", f"{size / s:.1f}", f"{s / GB:.2f}", "", "", "", ""] for s in results["disk"]
    ]
    cold = [["load, cold cache", *_cells(load, size)] for load in results["cold"]]
    rows = [row for pair in zip(disk, cold, strict=True) for row in pair]
    rows += [["load, warm cache", *_cells(load, size)] for load in results["warm"]]
    print_table(head, rows)
    figures = summarise(results)
    print(f"\npeak memory / size: {figures['peak_over_size']:.3f}  (promised: at most 1.1)")
    print(f"cold load / disk speed: {figures['load_over_disk']:.0%}  (promised: at least 70%)")
    if any(load["from_disk"] < 0.9 * size for load in results["cold"]):
        print("The cold runs were not cold: this file system kept the pages. Choose a disk with --folder.")
    if any(load["from_disk"] > 0.01 * size for load in results["warm"]):
        print("Memory was short: the warm runs had to read again, and the cold ones may have read twice.")


def _cells(load: dict[str, float], size: int) -> list[str]:
    speed, fetched = size / load["resident"] / GB, load["from_disk"] / GB
    memory = [f"{load['private'] / GB:.2f}", f"{load['mapped'] / GB:.2f}", f"{load['peak'] / size:.3f}"]
    return [f"{load['returned']:.2f}", f"{load['resident']:.1f}", f"{speed:.2f}", f"{fetched:.2f}", *memory]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the file goes"
    )
    parser.add_argument("--preset", choices=["stage_c_3.6b", "stage_c_1b"], default="stage_c_3.6b")
    parser.add_argument("--runs", type=int, default=3, help="cold and warm runs each")
    parser.add_argument("--json", type=output_file, help="also write the numbers to this file")
    parser.add_argument("--load-only", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load_only:
        print(json.dumps(load_and_touch(arguments.load_only)))
        return
    results = run(arguments.folder, arguments.preset, arguments.runs)
    report(results)
    if arguments.json:
        write_file(arguments.json, json.dumps({**results, **summarise(results)}, indent=2) + "\n")


if __name__ == "__main__":
    main()
