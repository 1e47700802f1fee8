"""Rows a second of `cascade batch`: one process against several, in turn, steady state.

The steady state lasts from the moment when every worker has loaded its models and made its first row until the first
worker has made its last. The workers are Ray's where it is installed; else, or with --shards, processes with a GPU and
a share of the rows each. Pictures are the demo's, or with --published those of the shipped graph, for which random
weights of the published size, 12 GB, are written to main memory or where --models says.

    python benchmarks/batch.py [--workers 2] [--rows 20] [--graph FILE | --published] [--shards] [--json FILE]

Promised: two workers on two cores 1.6 times one default process, two H200s 1.9 times one. Exit status 1 for less.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from cascade_nodes.cascade_core.writing import output_file, write_file
from machine import describe_machine, print_table
from served import configurations
from served_graphs import EXAMPLE, made_small
from served_programs import write_files

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "example_workflows" / "api" / "text_to_image.json"
TARGETS = {False: 1.6, True: 1.9}  # without and with GPUs

MEMORY = "/dev/shm"
ROOM = 14e9  # bytes that the random weights take, and the pictures


class FailedError(Exception):
    """A run that made too little; its message says why."""


def processes_of(options: argparse.Namespace, workers: int, folder: Path) -> list[subprocess.Popen]:
    """Starts a batch in `folder`: one process, one that has Ray's workers, or one for each share."""
    table = folder / "rows.jsonl"
    rows = range(options.rows * workers)
    lines = (json.dumps({"name": f"{seed:05}", "seed": seed}) + "\n" for seed in rows)
    table.write_text("".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "cascade_nodes.headless", "batch", str(options.graph), str(table)]
    command += ["--output", str(folder / "made")]
    # The default is measured: torch's own number of threads.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if options.models is not None:
        environment["CASCADE_MODELS"] = str(options.models)
    gpus, commands = torch.cuda.device_count(), [command]
    if workers > 1 and options.shards:
        commands = [[*command, "--shard", f"{number}/{workers}"] for number in range(1, workers + 1)]
    elif workers > 1:
        commands = [[*command, "--workers", str(workers)]]
    started = []
    for number, each in enumerate(commands):
        if gpus and (len(commands) > 1 or workers == 1):
            environment = {**environment, "CUDA_VISIBLE_DEVICES": str(number % gpus)}
        with (folder / f"{number}.log").open("wb") as log:
            started.append(subprocess.Popen(each, env=environment, stdout=log, stderr=subprocess.STDOUT))
    return started


def run_batch(options: argparse.Namespace, workers: int) -> dict[str, Any]:
    """Makes the rows. Returns the steady rows a second and more; raises FailedError."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = processes_of(options, workers, folder)
        try:
            codes = [process.wait(began + options.limit - time.monotonic()) for process in processes]
        except subprocess.TimeoutExpired:
            codes = [None]
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()
        if any(code != 0 for code in codes):
            logs = sorted(folder.glob("*.log"))
            said = "\n".join(log.read_text(encoding="utf-8", errors="replace")[-1500:] for log in logs)
            reason = f"exit status {codes}" if None not in codes else f"not done after {options.limit:.0f} s"
            raise FailedError(f"{reason}:\n{said}")
        return steady(folder / "made", workers) | {"seconds": time.monotonic() - began}


def steady(made: Path, workers: int) -> dict[str, Any]:
    texts = [file.read_text(encoding="utf-8") for file in made.glob("batch*.jsonl")]
    lines = [json.loads(line) for text in texts for line in text.splitlines()]
    ends: dict[str, list[float]] = {}
    for line in lines:
        end = (made / line["pictures"][0]).stat().st_mtime_ns / 1e9
        ends.setdefault(line["worker"], []).append(end)
    if len(ends) < workers:
        raise FailedError(f"{len(ends)} of {workers} workers made all {len(lines)} rows; give more --rows.")
    begun, done = max(map(min, ends.values())), min(map(max, ends.values()))
    within = [sorted(end for end in each if begun <= end <= done) for each in ends.values()]
    if min(map(len, within)) < 3:
        raise FailedError(
            f"{len(lines)} rows were nearly done before every worker had begun; give more --rows."
        )
    # Each worker between two of its own ends, so that it does not matter how they lie to each other's.
    rate = sum((len(each) - 1) / (each[-1] - each[0]) for each in within)
    rows = sum(len(each) - 1 for each in within)
    return {"workers": len(ends), "rows_per_second": rate, "steady_rows": rows, "span": done - begun}


def write_models(options: argparse.Namespace, folder: Path) -> None:
    """Writes random weights for the shipped graph, and chooses the graph."""
    options.models = options.models or folder / "models"
    if options.toy:
        options.graph = folder / "graph.json"
        example = json.loads(EXAMPLE.read_text(encoding="utf-8"))
        options.graph.write_text(json.dumps(made_small(example)), encoding="utf-8")
    else:
        options.graph = EXAMPLE
    # `write_files` writes a server's folder, in which `models` leads to the folder of models.
    folder_of_models = folder / "base"
    folder_of_models.mkdir()
    options.models.mkdir(parents=True, exist_ok=True)
    (folder_of_models / "models").symlink_to(options.models.resolve())
    write_files(folder_of_models, configurations(options.toy))


def has_room(folder: str) -> bool:
    return os.path.isdir(folder) and shutil.disk_usage(folder).free > ROOM


def measure(options: argparse.Namespace, target: float) -> float | None:
    """Runs one process, then several; prints and writes each result. Returns the ratio of their speeds, if known."""
    report: dict[str, Any] = {
        "machine": describe_machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator",
        "graph": options.graph.name,
        "how": "shares" if options.shards else "Ray",
        "target": target,
        "runs": [],
    }
    times = None
    for workers in (1, options.workers):
        try:
            run = {"failed": None, **run_batch(options, workers)}
        except FailedError as error:
            run = {"workers": workers, "failed": str(error)}
        print(run, flush=True)
        report["runs"].append(run)
        if len(report["runs"]) == 2 and not any(each["failed"] for each in report["runs"]):
            one, many = (each["rows_per_second"] for each in report["runs"])
            times = report["times"] = many / one
        if options.json:
            write_file(options.json, json.dumps(report, indent=1) + "\n")
    rows = [
        (
            str(run["workers"]),
            f"{run['rows_per_second']:.3f}",
            str(run["steady_rows"]),
            f"{run['seconds']:.0f}",
        )
        for run in report["runs"]
        if not run["failed"]
    ]
    print_table(("workers", "rows a second", "of steady rows", "s in all"), rows)
    return times


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=20, help="for each worker; loading is a small part")
    parser.add_argument("--graph", type=Path, default=DEMO)
    parser.add_argument("--published", action="store_true", help="the shipped graph, with random weights")
    parser.add_argument(
        "--toy", action="store_true", help="with --published: small networks, to try the script"
    )
    parser.add_argument("--models", type=Path, help="where they are, or are written")
    parser.add_argument("--shards", action="store_true", help="without Ray")
    parser.add_argument("--limit", type=float, default=1800, help="seconds of each run")
    parser.add_argument("--target", type=float, help="how many times one process; default as promised")
    parser.add_argument("--json", type=output_file, metavar="FILE")
    options = parser.parse_args()
    options.shards = options.shards or importlib.util.find_spec("ray") is None
    target = options.target or TARGETS[torch.cuda.is_available()] * options.workers / 2
    with tempfile.TemporaryDirectory(dir=MEMORY if options.published and has_room(MEMORY) else None) as name:
        if options.published:
            began = time.monotonic()
            write_models(options, Path(name))
            print(f"Random weights are there after {time.monotonic() - began:.0f} s.", flush=True)
        times = measure(options, target)
    if times is None:
        return 1
    print(f"{times:.2f} times one process; promised: {target:.2f}")
    return 0 if times >= target else 1


if __name__ == "__main__":
    sys.exit(main())
