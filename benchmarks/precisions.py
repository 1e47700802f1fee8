"""Seconds of a picture without ComfyUI by the precision of Stage C and B, in turn in one process.

The whole cascade with random weights, as benchmarks/memory.py has it: 1024 × 1024, 20 and 10 steps with guidance in
both, text encoding and decoding included, by the nodes as `cascade run` calls them. Medians after two to warm up.

    python benchmarks/precisions.py [--dtypes bf16,fp16] [--runs 5] [--folder FOLDER] [--files FILES] [--json FILE]
                                    [--toy]

--toy runs all of it on a processor with tiny networks.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from cascade_nodes.cascade_core.stages.device import DTYPES
from cascade_nodes.cascade_core.writing import output_file, write_file
from limited_memory import Cascade
from machine import describe_machine, print_table
from memory import write_all
from timing import relative_error, seconds

WARM = 2


def measure(folder: Path, dtypes: list[str], runs: int, toy: bool) -> dict[str, Any]:
    """Seconds of each picture by dtype, and how far a seed's picture is from that of the first dtype."""
    device = torch.device("cpu" if toy else "cuda")
    side, steps = (64, (2, 2)) if toy else (1024, (20, 10))
    cascades = {dtype: Cascade(folder, side, steps, dtype) for dtype in dtypes}
    pictures = {dtype: [cascade.picture(0) for _ in range(WARM)][-1] for dtype, cascade in cascades.items()}
    times: dict[str, list[float]] = {dtype: [] for dtype in dtypes}
    for seed in range(1, runs + 1):
        for dtype, cascade in cascades.items():
            times[dtype].append(seconds(lambda c=cascade, s=seed: c.picture(s), device))
    return {
        dtype: {
            "seconds": statistics.median(times[dtype]),
            "times": times[dtype],
            "distance": relative_error(pictures[dtype], pictures[dtypes[0]]),
        }
        for dtype in dtypes
    }


def report(results: dict[str, Any], first: str) -> None:
    rows = [
        [
            dtype,
            f"{row['seconds']:.3f}",
            f"{row['seconds'] / results[first]['seconds']:.2f}",
            f"{row['distance']:.4f}",
        ]
        for dtype, row in results.items()
    ]
    print_table(["dtype", "seconds", f"× {first}", f"distance of a picture to {first}'s"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=["bf16", "fp16"])
    parser.add_argument("--runs", type=int, default=5, help="pictures of each median")
    parser.add_argument("--folder", type=Path, help="where the random files lie meanwhile")
    parser.add_argument(
        "--files", type=Path, help="keep the files here, for the next run or benchmarks/memory.py"
    )
    parser.add_argument("--json", type=output_file, help="also keep the numbers here")
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    if unknown := [dtype for dtype in options.dtypes if dtype not in DTYPES]:
        parser.error(f"{', '.join(unknown)} is not one of {', '.join(DTYPES)}")
    if not (options.toy or torch.cuda.is_available()):
        raise SystemExit("There is no CUDA device here; --toy runs tiny networks on the processor.")
    with tempfile.TemporaryDirectory(prefix="cascade_precisions_", dir=options.folder) as folder:
        files = options.files or Path(folder)
        files.mkdir(parents=True, exist_ok=True)
        write_all(files, options.toy)
        results = measure(files, options.dtypes, options.runs, options.toy)
    report(results, options.dtypes[0])
    if options.json:
        card = "" if options.toy else f", {torch.cuda.get_device_name()}"
        kept = {"machine": describe_machine() + card, "torch": torch.__version__, "dtypes": results}
        write_file(options.json, json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
