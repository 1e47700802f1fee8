"""Rows a second of `cascade batch`: one default process against workers, in turn, steady state.

Steady: from the moment when every worker has made its first row, models loaded, to the end. Pictures are the demo's
without --graph; on a machine with GPUs give a graph of the published size, such as
example_workflows/api/text_to_image_published.json, whose files `cascade models` finds.

    python benchmarks/batch.py [--workers 2] [--rows 40] [--graph FILE] [--target 1.6] [--json FILE]

Promised: two workers on two cores 1.6 times one default process, two H200s 1.9 times one. Exit status 1 for less.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cascade_nodes.cascade_core.writing import output_file, write_file
from machine import describe_machine, print_table

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "example_workflows" / "api" / "text_to_image.json"
TARGETS = {False: 1.6, True: 1.9}  # without and with GPUs


def run_batch(graph: Path, rows: int, folder: Path, options: Sequence[str]) -> tuple[float, int]:
    """Makes the rows. Returns the steady rows a second, and how many workers made them."""
    table = folder / "rows.jsonl"
    table.write_text("".join(json.dumps({"name": f"{seed:05}", "seed": seed}) + "\n" for seed in range(rows)))
    command = [sys.executable, "-m", "cascade_nodes.headless", "batch", str(graph), str(table), "--output"]
    made = folder / "made"
    # The default is measured: torch's own number of threads.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    subprocess.run([*command, str(made), *options], check=True, stdout=subprocess.DEVNULL, env=environment)
    lines = [json.loads(line) for line in (made / "batch.jsonl").read_text().splitlines()]
    ends = [((made / line["pictures"][0]).stat().st_mtime_ns / 1e9, line["worker"]) for line in lines]
    workers = {worker: min(end for end, by in ends if by == worker) for _, worker in ends}
    begun = max(workers.values())
    later = [end for end, _ in ends if end > begun]
    if len(later) < 2 * len(workers):
        sys.exit(f"{rows} rows were nearly done before every worker had begun; give more --rows.")
    return len(later) / (max(later) - begun), len(workers)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--rows", type=int, default=40, help="of each run; enough that loading is a small part"
    )
    parser.add_argument("--graph", type=Path, default=DEMO)
    parser.add_argument("--target", type=float, help="how many times one process; default as promised")
    parser.add_argument("--json", type=output_file, metavar="FILE")
    options = parser.parse_args()
    target = options.target or TARGETS[torch.cuda.is_available()] * options.workers / 2
    measured: list[dict[str, Any]] = []
    for arguments in ([], ["--workers", str(options.workers)]):
        with tempfile.TemporaryDirectory() as folder:
            rate, workers = run_batch(options.graph, options.rows, Path(folder), arguments)
        measured.append(
            {"options": " ".join(arguments) or "one process", "workers": workers, "rows_per_second": rate}
        )
    times = measured[1]["rows_per_second"] / measured[0]["rows_per_second"]
    print_table(
        ("options", "workers", "rows a second"),
        [(row["options"], str(row["workers"]), f"{row['rows_per_second']:.3f}") for row in measured],
    )
    print(f"{times:.2f} times one process; promised: {target:.2f}")
    if options.json:
        report = {"machine": describe_machine(), "runs": measured, "times": times, "target": target}
        write_file(options.json, json.dumps(report, indent=2) + "\n")
    return 0 if times >= target else 1


if __name__ == "__main__":
    sys.exit(main())
