"""How long the bundled demo cascade takes for a picture on this processor, and where the time goes.

The graph is executed by the embedded host as `cascade run` does it. First a whole command in a fresh process
with interpreter, imports and loading; then, in this process, one picture that loads the models and some after
that, each with another prompt and seed, so that nothing is reused but the models.

    python benchmarks/cpu.py [--runs 5] [--threads N] [--json FILE]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from cascade_nodes.headless.execution import Executor
from cascade_nodes.headless.run import run_graph
from machine import describe_machine, print_table

GRAPH = Path(__file__).parents[1] / "example_workflows" / "api" / "text_to_image.json"
PROMPTS = [
    "a large red star to the left of a small blue ring on a sand background",
    "a small green circle above a large yellow square on a sky background",
    "a purple heart on a pink background",
    "a small orange triangle to the right of a large white star on a mint background",
]
PARTS = {
    "CascadeTextEncode": "text",
    "CascadePriorSampler": "Stage C",
    "CascadeDecoderSampler": "Stage B",
    "CascadeDecode": "Stage A",
    "SaveImage": "saving",
}
LOADING, OTHER, WHOLE = "loading", "other", "whole picture"


def time_command(graph: Path, output: Path) -> float:
    """Seconds of `cascade run` from start to end in a fresh process."""
    command = [sys.executable, "-m", "cascade_nodes.headless", "run", str(graph), "--output", str(output)]
    start = time.perf_counter()
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if finished.returncode:
        raise SystemExit(f"`cascade run` ended with {finished.returncode}: {finished.stderr.strip()}")
    return seconds


def time_picture(graph: Path, output: Path, executor: Executor, number: int) -> dict[str, float]:
    """Seconds of one picture by part. What no part claims (validation, bookkeeping) is `other`."""
    assignments = [
        f"CascadeTextEncode.positive={PROMPTS[number % len(PROMPTS)]}",
        f"CascadePriorSampler.seed={number}",
        f"CascadeDecoderSampler.seed={number}",
    ]
    start = time.perf_counter()
    result = run_graph(graph, assignments=assignments, output_folder=output, executor=executor)
    whole = time.perf_counter() - start
    nodes = json.loads(graph.read_text(encoding="utf-8"))
    seconds = dict.fromkeys((LOADING, *PARTS.values(), OTHER), 0.0)
    for node_id, spent in result.timings.items():
        seconds[_part(nodes[node_id]["class_type"])] += spent
    seconds[OTHER] += whole - sum(seconds.values())
    return {**seconds, WHOLE: whole}


def _part(class_type: str) -> str:
    if class_type.endswith("Loader") or class_type == "StageAVAE":
        return LOADING
    return PARTS.get(class_type, OTHER)


def run(graph: Path, runs: int) -> dict[str, Any]:
    """All measurements; the pictures are thrown away."""
    with tempfile.TemporaryDirectory(prefix="cascade_cpu_") as folder:
        command = time_command(graph, Path(folder))
        executor = Executor()
        first = time_picture(graph, Path(folder), executor, 0)
        later = [time_picture(graph, Path(folder), executor, number) for number in range(1, runs + 1)]
    return {
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "command": command,
        "first": first,
        "later": later,
    }


def report(results: dict[str, Any]) -> None:
    """Prints the parts: the picture that loads the models, then the median and the worst of the others."""
    later = results["later"]
    medians = {part: statistics.median(picture[part] for picture in later) for part in later[0]}
    rows = [
        [
            part,
            f"{results['first'][part]:.2f}",
            f"{medians[part]:.2f}",
            f"{max(picture[part] for picture in later):.2f}",
            f"{medians[part] / medians[WHOLE]:.0%}",
        ]
        for part in later[0]
    ]
    print(f"{results['machine']}, {results['threads']} threads\n")
    print_table(["seconds", "first", f"median of {len(later)}", "worst", "share"], rows)
    print(f"\n`cascade run` in a fresh process, start to end: {results['command']:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--graph", type=Path, default=GRAPH, help="a text-to-image graph in API format")
    parser.add_argument("--runs", type=int, default=5, help="pictures after the first")
    parser.add_argument("--threads", type=int, help="of torch, but not in the fresh process")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    results = run(arguments.graph, arguments.runs)
    report(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
