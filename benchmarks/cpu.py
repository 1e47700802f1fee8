"""Time of a picture by the bundled demo cascade on this processor, by stage, and the time that the engine saves.

The graph is executed by the embedded host as `cascade run` does it. First, a whole command in a fresh process, with
interpreter, imports and loading. Then, in this process, pictures by each program in turn, each with another prompt
and seed, so that only the models are reused; all programs draw the same pictures:

    eager                     the networks themselves, in float32
    engine                    the same arithmetic through the engine: what a user gets
    engine, Stage B in bf16   its dtype chosen, for processors that multiply bf16 (AVX-512 BF16, AMX)

Each program's first picture loads the models and is not counted. Of the others, the fastest is compared, since other
load on the machine only adds time; the median is printed beside it. The plain networks are measured in a process
whose C library keeps freed memory, as the engine sets it, which makes them faster than they would be otherwise.

    python benchmarks/cpu.py [--runs 5] [--threads N] [--json FILE]
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from cascade_nodes.cascade_core.engine.vqgan import DecoderEngine
from cascade_nodes.cascade_core.writing import output_file, write_file
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
EAGER = "eager"
PROGRAMS = {
    EAGER: ["CascadePriorSampler.engine=false", "CascadeDecoderSampler.engine=false"],
    "engine": [],
    "engine, Stage B in bf16": ["StageBLoader.dtype=bf16"],
}
TARGET = 0.5  # of the eager time


def time_command(graph: Path, output: Path) -> float:
    """Seconds of `cascade run` from start to end in a fresh process."""
    command = [sys.executable, "-m", "cascade_nodes.headless", "run", str(graph), "--output", str(output)]
    start = time.perf_counter()
    finished = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    seconds = time.perf_counter() - start
    if finished.returncode:
        raise SystemExit(f"`cascade run` ended with {finished.returncode}: {finished.stderr.strip()}")
    return seconds


class TimedProgram:
    """Program of PROGRAMS, with its loaded models and the times of its pictures."""

    def __init__(self, name: str, graph: Path, output: Path):
        self.name, self.graph, self.output = name, graph, output
        self.executor = Executor()
        self.seconds: list[dict[str, float]] = []  # for each picture, by part
        self.pictures: list[np.ndarray] = []  # (H, W, 3) in [0, 1]

    def draw(self, number: int) -> None:
        """Draws one more picture. Time outside the nodes (validation, bookkeeping) counts as `other`."""
        assignments = [
            f"CascadeTextEncode.positive={PROMPTS[number % len(PROMPTS)]}",
            f"CascadePriorSampler.seed={number}",
            f"CascadeDecoderSampler.seed={number}",
            *PROGRAMS[self.name],
        ]
        with _eager_stage_a() if self.name == EAGER else nullcontext():
            start = time.perf_counter()
            result = run_graph(
                self.graph, assignments=assignments, output_folder=self.output, executor=self.executor
            )
            whole = time.perf_counter() - start
        nodes = json.loads(self.graph.read_text(encoding="utf-8"))
        seconds = dict.fromkeys((LOADING, *PARTS.values(), OTHER), 0.0)
        for node_id, spent in result.timings.items():
            seconds[_part(nodes[node_id]["class_type"])] += spent
        seconds[OTHER] += whole - sum(seconds.values())
        self.seconds.append({**seconds, WHOLE: whole})
        with Image.open(result.pictures[-1].path) as picture:
            self.pictures.append(np.asarray(picture.convert("RGB"), np.float64) / 255)


@contextmanager
def _eager_stage_a() -> Iterator[None]:
    """Disables Stage A's engine, which has no switch in the graph, unlike the samplers'."""
    with mock.patch.object(DecoderEngine, "__call__", lambda engine, latent: engine.stage_a.decode(latent)):
        yield


def _part(class_type: str) -> str:
    if class_type.endswith("Loader") or class_type == "StageAVAE":
        return LOADING
    return PARTS.get(class_type, OTHER)


def difference(pictures: list[np.ndarray], references: list[np.ndarray]) -> dict[str, float]:
    """PSNR of the worst picture in dB, and the largest difference in 255ths."""
    pairs = list(zip(pictures, references, strict=True))
    squares = max(float(np.mean((a - b) ** 2)) for a, b in pairs)
    return {
        "psnr": -10 * math.log10(squares) if squares else math.inf,
        "largest": max(float(np.abs(a - b).max()) for a, b in pairs) * 255,
    }


def run(graph: Path, runs: int) -> dict[str, Any]:
    """Runs all measurements; the pictures are deleted."""
    with tempfile.TemporaryDirectory(prefix="cascade_cpu_") as folder:
        command = time_command(graph, Path(folder))
        programs = [TimedProgram(name, graph, Path(folder)) for name in PROGRAMS]
        for number in range(runs + 1):
            for program in programs:  # in turn, so that a busy minute of the machine meets them all
                program.draw(number)
    references = programs[0].pictures
    return {
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "command": command,
        "programs": {
            program.name: {
                "first": program.seconds[0],
                "later": program.seconds[1:],
                "difference": difference(program.pictures, references),
            }
            for program in programs
        },
    }


def report(results: dict[str, Any]) -> None:
    """Prints the fastest picture of each program by part; then whole pictures, ratio and difference to the first."""
    programs = results["programs"]
    fastest = {
        name: {part: min(picture[part] for picture in program["later"]) for part in program["first"]}
        for name, program in programs.items()
    }
    print(f"{results['machine']}, {results['threads']} threads\n")
    stages = [part for part in fastest[EAGER] if part not in (LOADING, WHOLE)]
    print_table(
        ["seconds, fastest", *programs],
        [[part, *(f"{fastest[name][part]:.3f}" for name in programs)] for part in stages],
    )
    print()
    rows = []
    for name, program in programs.items():
        wholes = [picture[WHOLE] for picture in program["later"]]
        distance = program["difference"]
        rows.append(
            [
                name,
                f"{min(wholes):.2f}",
                f"{statistics.median(wholes):.2f}",
                f"{min(wholes) / fastest[EAGER][WHOLE]:.2f}",
                f"{distance['psnr']:.1f} dB",
                f"{distance['largest']:.0f}",
            ]
        )
    count = len(programs[EAGER]["later"])
    print_table(
        ["whole picture", "fastest", f"median of {count}", "of eager", "PSNR", "farthest / 255"], rows
    )
    print(f"\nTarget: {TARGET} of eager, at 40 dB or more.")
    print(f"`cascade run` in a fresh process, start to end: {results['command']:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--graph", type=Path, default=GRAPH, help="a text-to-image graph in API format")
    parser.add_argument("--runs", type=int, default=5, help="pictures of each program after its first")
    parser.add_argument("--threads", type=int, help="torch's threads, except in the fresh process")
    parser.add_argument("--json", type=output_file, help="also write the numbers to this file")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    results = run(arguments.graph, arguments.runs)
    report(results)
    if arguments.json:
        write_file(arguments.json, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
