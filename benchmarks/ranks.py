"""Training on two GPUs beside one, the same batch on each: a full finetune by FSDP2, a LoRA and a ControlNet.

    python benchmarks/ranks.py [--size 3.6b] [--batch 8] [--steps 15] [--tasks finetune lora controlnet] [--json FILE]

Each run is `benchmarks/training.py`, with random weights. First one GPU each, both at once: the finetune on the first,
the others on the second. Then all of it on two, by torchrun. Asked: of the finetune at most 0.6 of the memory on each
and at least 1.8 times the pictures a second; of the others at least 1.9 times.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cascade_nodes.cascade_core.writing import output_file, write_file
from machine import describe_machine, print_table

TRAINING = Path(__file__).with_name("training.py")
ASKED = {"finetune": 1.8, "lora": 1.9, "controlnet": 1.9}
ASKED_MEMORY = 0.6


def begin(
    options: argparse.Namespace, tasks: list[str], batch: int, folder: Path, gpu: int | None
) -> tuple[subprocess.Popen, Path]:
    """Start a run on one GPU, or on two where none is named; returns it and where its figures will be."""
    file = folder / f"{'-'.join(tasks)} {gpu}.json"
    launch = [sys.executable] if gpu is not None else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    ]  # fmt: skip
    command = [*launch, str(TRAINING), "--tasks", *tasks, "--size", options.size, "--batch", str(batch)]
    command += ["--steps", str(options.steps), "--warm", "5", "--json", str(file)]
    command += ["--latent", str(options.latent), *(["--fsdp"] if gpu is None else [])]
    visible = "0,1" if gpu is None else str(gpu)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible, "OMP_NUM_THREADS": "4"}
    return subprocess.Popen(command, env=environment), file


def figures(runs: list[tuple[subprocess.Popen, Path]]) -> dict[str, dict[str, Any]]:
    """What runs that were begun print, by task; a run that fails has none."""
    found: dict[str, dict[str, Any]] = {}
    for process, file in runs:
        if process.wait() == 0:
            found |= json.loads(file.read_text(encoding="utf-8"))["results"]
    return found


def row(task: str, one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    pictures = 2 * two["steps_per_second"] / one["steps_per_second"]
    memory = two["peak_gb"] / one["peak_gb"] if one["peak_gb"] else 0.0
    met = pictures >= ASKED[task] and (task != "finetune" or memory <= ASKED_MEMORY)
    cells = [f"{one['steps_per_second']:.3g}", f"{two['steps_per_second']:.3g}", f"{pictures:.2f}"]
    cells += [f"{one['peak_gb']:.1f}", f"{two['peak_gb']:.1f}", f"{memory:.2f}"]
    return [task, *cells, "met" if met else "missed"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=tuple(ASKED), default=list(ASKED))
    parser.add_argument("--size", choices=("3.6b", "1b", "tiny"), default="3.6b")
    parser.add_argument("--latent", type=int, default=24, help="positions a side")
    parser.add_argument("--batch", type=int, default=8, help="of the finetune on each GPU; the others have 4")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--json", type=output_file, help="also write the numbers here")
    options = parser.parse_args()
    began = time.monotonic()
    small = [task for task in options.tasks if task != "finetune"]
    groups = [(["finetune"], options.batch)] if "finetune" in options.tasks else []
    groups += [(small, 4)] if small else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one = figures([begin(options, *group, folder, gpu) for gpu, group in enumerate(groups)])
        two: dict[str, dict[str, Any]] = {}
        for group in groups:
            two |= figures([begin(options, *group, folder, None)])
    rows = [row(task, one[task], two[task]) for task in options.tasks if task in one and task in two]
    print(f"\n{describe_machine()}, Stage C {options.size}, {time.monotonic() - began:.0f} s\n")
    columns = [
        "task",
        "steps/s, one",
        "each of two",
        "× pictures",
        "peak GB, one",
        "of two",
        "× memory",
        "asked",
    ]
    print_table(columns, rows)
    if options.json is not None:
        write_file(
            options.json, json.dumps({"machine": describe_machine(), "one": one, "two": two}, indent=1)
        )
    if len(rows) < len(options.tasks):
        sys.exit("Some of the runs failed; what they said is above.")


if __name__ == "__main__":
    main()
