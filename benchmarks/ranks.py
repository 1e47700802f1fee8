"""Training on two GPUs beside one, the same batch on each: full finetunes by FSDP2, a LoRA and a ControlNet.

    python benchmarks/ranks.py [--tasks finetune finetune_b lora controlnet] [--size 3.6b] [--seconds 100] [--json FILE]
    python benchmarks/ranks.py --tasks finetune finetune:24 finetune_b:12 --steps 5    # the batch on each GPU
    python benchmarks/ranks.py --tasks finetune --variants profile "unit 33554432 prefetch 1" checkpoint-blocks

Each measurement is `benchmarks/training.py` with random weights, in processes of its own, which import while others
measure. Those on one GPU go beside each other where they can. Each row is written as soon as it is there, and one
that fails or takes too long leaves the others alone. Asked: of a finetune at most 0.6 of the memory on each and at
least 1.8 times the pictures a second; of the others at least 1.9 times. Without GPUs, two processes of the processor.
Variants are further options of `benchmarks/training.py`, without dashes, for the first task on two GPUs.
"""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from cascade_nodes.cascade_core.writing import output_file, write_file
from machine import describe_machine, print_table

TRAINING = Path(__file__).with_name("training.py")
PICTURES = {"finetune": 1.8, "finetune_b": 1.8, "lora": 1.9, "controlnet": 1.9}  # times as many
MEMORY = {"finetune": 0.6, "finetune_b": 0.6}
DEFAULT = ("finetune", "finetune_b", "lora", "controlnet")  # the most wanted first
BATCH = {"finetune": 16, "finetune_b": 12, "lora": 4, "controlnet": 4}  # on each GPU
WARM = 5  # steps: the first chooses kernels, the second captures CUDA graphs
# On one machine: the loopback for gloo, and no NVLink multicast, which can put shared hosts' GPUs out of service.
ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_NVLS_ENABLE": "0", "OMP_NUM_THREADS": "4"}


@dataclass
class Measurement:
    """A task on some GPUs: its processes, which wait for `turn`, and what came of it.

    row: `task:batch`
    """

    row: str
    gpus: tuple[int, ...]
    folder: Path
    variant: str = ""  # further options of `training.py`
    processes: list[subprocess.Popen] = field(default_factory=list)
    ends: float = 0.0
    figures: dict[str, Any] | None = None
    failure: str | None = None

    @property
    def task(self) -> str:
        return self.row.partition(":")[0]

    @property
    def batch(self) -> int:
        return int(self.row.partition(":")[2])

    @property
    def name(self) -> str:
        return f"{self.row}, {'one GPU' if len(self.gpus) == 1 else 'two'} {self.variant}".rstrip()

    def variant_options(self) -> list[str]:
        return [word if word.isdigit() else f"--{word}" for word in self.variant.split()]

    def file(self, what: str) -> Path:
        return self.folder / f"{self.name}.{what}"

    def start(self, options: argparse.Namespace) -> None:
        """Starts the processes, which import and then wait."""
        command = [sys.executable, str(TRAINING), "--tasks", self.task, "--size", options.size]
        command += ["--batch", str(self.batch), "--steps", str(options.steps), "--warm", str(WARM)]
        command += ["--latent", str(options.latent), "--json", str(self.file("json"))]
        command += ["--after", str(self.file("turn")), *self.variant_options()]
        world: dict[str, str] = {}
        if len(self.gpus) > 1:
            command += ["--fsdp"]
            world = {
                "WORLD_SIZE": str(len(self.gpus)),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": free_port(),
            }
        visible = ",".join(map(str, self.gpus))
        for rank in range(len(self.gpus)):
            own = {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} if world else {}
            with self.file(f"{rank}.log").open("wb") as log:
                outputs: dict[str, Any] = {"stdout": log, "stderr": subprocess.STDOUT}
                environment = {**ENVIRONMENT, **os.environ, "CUDA_VISIBLE_DEVICES": visible, **own}
                self.processes.append(subprocess.Popen(command, env=environment, **outputs))

    def look(self) -> bool:
        """Whether it has ended: its figures are there, a process failed, or it takes too long. Ends all of them."""
        codes = [process.poll() for process in self.processes]
        if self.file("json").exists():
            result = json.loads(self.file("json").read_text(encoding="utf-8"))["results"][self.task]
            self.failure = result.get("failed")
            self.figures = result if self.failure is None else None
        elif any(codes):
            self.failure = f"ended with exit status {next(filter(None, codes))}"
        elif time.monotonic() > self.ends:
            self.failure = "took too long"
        elif None in codes:
            return False
        else:
            self.failure = "ended without figures"
        self.end()
        return True

    def end(self) -> None:
        """Ends the processes, and with them what they hold of the GPUs."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()

    def told(self) -> str:
        """The end of what the processes printed."""
        logs = [self.file(f"{rank}.log") for rank in range(len(self.gpus))]
        return "\n".join(log.read_text(encoding="utf-8", errors="replace")[-2000:] for log in logs)


def row_name(text: str) -> str:
    """`task:batch` of a task, or of a task with its batch."""
    task, colon, batch = text.partition(":")
    if task not in PICTURES or (colon and not batch.isdecimal()):
        raise argparse.ArgumentTypeError(
            f"one of {', '.join(PICTURES)}, with or without :BATCH, not {text!r}"
        )
    return f"{task}:{int(batch or BATCH[task])}"


def free_port() -> str:
    """A free port below those that the system gives out itself, so that it is still free later."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as found:
            try:
                found.bind(("127.0.0.1", port))
            except OSError:
                continue
            return str(port)


def measure(measurements: list[Measurement], options: argparse.Namespace, began: float) -> None:
    """Gives each its turn, in this order, as soon as its GPUs are free; writes the rows so far after each."""
    waiting, running = list(measurements), list[Measurement]()
    for each in waiting:
        each.start(options)
    try:
        while waiting or running:
            taken = {gpu for each in running for gpu in each.gpus}
            for each in list(waiting):
                if taken.isdisjoint(each.gpus):
                    each.ends = min(time.monotonic() + options.limit, began + options.seconds)
                    each.file("turn").touch()
                    waiting.remove(each)
                    running.append(each)
                taken.update(each.gpus)
            time.sleep(0.05)
            for each in [each for each in running if each.look()]:
                running.remove(each)
                figures = each.figures and {**each.figures, "profile": None}
                print(
                    f"{time.monotonic() - began:4.0f} s  {each.name}: {figures or each.failure}", flush=True
                )
                if each.failure:
                    print(each.told(), flush=True)
                write(measurements, options, began)
    finally:
        for each in measurements:
            each.end()


def rows_of(measurements: list[Measurement]) -> dict[str, dict[str, Any]]:
    """Figures on one GPU and on two by row, and their ratios."""
    rows: dict[str, dict[str, Any]] = {}
    for each in measurements:
        row = rows.setdefault(
            each.row,
            {
                "date": date.today().isoformat(),
                "batch": each.batch,
                "asked": PICTURES[each.task],
                "asked_memory": MEMORY.get(each.task),
            },
        )
        if each.variant:
            row.setdefault("variants", {})[each.variant] = each.figures
        else:
            row["one" if len(each.gpus) == 1 else "two"] = each.figures
    for row in rows.values():
        one, two = row["one"], row["two"]
        for variant in row.get("variants", {}).values():
            if one and variant:
                variant["times"] = 2 * variant["steps_per_second"] / one["steps_per_second"]
        if one and two:
            row["times"] = 2 * two["steps_per_second"] / one["steps_per_second"]
            row["memory"] = two["peak_gb"] / one["peak_gb"] if one["peak_gb"] else None
            enough = row["asked_memory"] is None or (row["memory"] or 0) <= row["asked_memory"]
            row["met"] = row["times"] >= row["asked"] and enough
    return rows


def write(measurements: list[Measurement], options: argparse.Namespace, began: float) -> None:
    if options.json is None:
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator"
    record = {
        "machine": describe_machine(),
        "date": date.today().isoformat(),
        "device": device,
        "options": {key: value for key, value in vars(options).items() if key != "json"},
        "seconds": time.monotonic() - began,
        "rows": rows_of(measurements),
        "failed": {each.name: each.failure for each in measurements if each.failure},
    }
    write_file(options.json, json.dumps(record, indent=1) + "\n")


def cells(task: str, row: dict[str, Any]) -> list[str]:
    one, two = row["one"] or {}, row["two"] or {}

    def cell(value: float | None, form: str) -> str:
        return "—" if value is None else format(value, form)

    shown = [cell(each.get("steps_per_second"), ".3g") for each in (one, two)] + [
        cell(row.get("times"), ".2f")
    ]
    shown += [cell(each.get("peak_gb"), ".1f") for each in (one, two)] + [cell(row.get("memory"), ".2f")]
    return [task, *shown, {True: "met", False: "missed", None: "not measured"}[row.get("met")]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tasks", nargs="+", type=row_name, default=list(map(row_name, DEFAULT)), metavar="TASK[:BATCH]"
    )
    parser.add_argument("--size", choices=("3.6b", "1b", "tiny"), default="3.6b")
    parser.add_argument("--latent", type=int, default=24, help="positions a side")
    parser.add_argument("--steps", type=int, default=10, help=f"measured, after {WARM}")
    parser.add_argument("--limit", type=float, default=60, help="seconds of each from its turn on")
    parser.add_argument(
        "--seconds",
        type=float,
        default=100,
        help="seconds of all together; what is not done then is left out",
    )
    parser.add_argument("--variants", nargs="*", default=[], help="as above, each in quotes")
    parser.add_argument("--json", type=output_file, help="also write the numbers here, after each of them")
    options = parser.parse_args()
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        sys.exit("There is one GPU; two are expected.")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        # On one GPU each, beside each other; then each on both.
        alone = [Measurement(task, (number % 2,), Path(name)) for number, task in enumerate(options.tasks)]
        both = [Measurement(task, (0, 1), Path(name)) for task in options.tasks]
        variants = [
            Measurement(options.tasks[0], (0, 1), Path(name), variant) for variant in options.variants
        ]
        measurements = [*alone, *both, *variants]
        measure(measurements, options, began)
    print(f"\n{describe_machine()}, {time.monotonic() - began:.0f} s\n")
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
    rows = rows_of(measurements)
    lines = [cells(task, row) for task, row in rows.items()]
    for task, row in rows.items():
        for variant, figures in row.get("variants", {}).items():
            lines.append(cells(f"{task} {variant}", {**row, "two": figures, **(figures or {}), "met": None}))
    print_table(columns, lines)
    if any(each.failure for each in measurements):
        sys.exit("Some of the measurements failed; what they said is above.")


if __name__ == "__main__":
    main()
