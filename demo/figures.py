"""Measures all figures of demo/README: `python -m cascade_nodes.demo.figures --gpus 0,1 --weights DIR`.

Sets are measured side by side on the GPUs, or one after the other on processors, each in its own process (evaluate,
tasks, high_resolution) with its own log. Their figures are combined into evaluate.json, tasks.json, high_2.json and
high_4.json in `--work`, from which `pages` fills the tables; `sheets` there holds a contact sheet of each set.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.cascade_core.writing import write_file
from cascade_nodes.demo.pipeline import WEIGHTS

LARGER = {2: 100, 4: 16}  # factor of the size -> number of pictures
TASK_COUNT = 200  # pictures for each figure of a task
# Sets measured in one process, all of about the same duration, the longest first
SETS = (
    ("pairs",),
    ("three", "negation"),
    ("punctuation", "proportions", "judges"),
    ("adherence", "reconstruction"),
    ("renderer", "embeddings"),
    ("unguided", "negative", "judge"),
)
TASK_SETS = (
    ("lora", "few_steps"),
    ("variation", "mixing"),
    ("controlnet_canny", "super_resolution"),
    ("inpaint", "outpaint", "token"),
    ("image_to_image",),
)


class Measurement(NamedTuple):
    """One measuring process. whole: the file that its figures become part of"""

    name: str
    whole: str
    command: Sequence[str]


def measurements(options: argparse.Namespace, only: Sequence[str] = ()) -> Iterator[Measurement]:
    """Yields the measurements for the options' work folder, weights and count. only: names of those to yield"""
    work, common = options.work, ["--weights", str(options.weights)]
    sheets = ["--sheets", str(work / "sheets")]

    def command(module: str, name: str, count: int, *more: str) -> list[str]:
        json_file = ["--json", str(work / "parts" / f"{name}.json")]
        start = [sys.executable, "-m", f"cascade_nodes.demo.{module}", *common]
        return [*start, "--count", str(min(options.count, count)), *json_file, *more]

    def wanted(names: Sequence[str]) -> list[str]:
        return [name for name in names if not only or name in only]

    for scale, count in LARGER.items():
        name = f"high_{scale}"
        if wanted([name]):
            yield Measurement(name, name, command("high_resolution", name, count, "--scale", str(scale)))
    for names in map(wanted, TASK_SETS):
        if names:
            yield Measurement(
                names[0], "tasks", command("tasks", names[0], TASK_COUNT, *sheets, "--", *names)
            )
    for names in map(wanted, SETS):
        if names:
            yield Measurement(
                names[0], "evaluate", command("evaluate", names[0], options.count, *sheets, "--only", *names)
            )


def measure(
    options: argparse.Namespace, gpus: Sequence[str], only: Sequence[str] = (), seconds: float = 1e6
) -> None:
    """Measures side by side on GPUs (none: in turn), and writes the figures. Raises CascadeError for failed sets.

    seconds: after which unfinished measurements are given up
    """
    parts, logs = options.work / "parts", options.work / "logs"
    for folder in (parts, logs, options.work / "sheets"):
        folder.mkdir(parents=True, exist_ok=True)
    planned = list(measurements(options, only))
    for each in planned:
        (parts / f"{each.name}.json").unlink(missing_ok=True)
    end = time.monotonic() + seconds
    begun: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for number, each in enumerate(planned):
            gpu = gpus[number % len(gpus)] if gpus else ""
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
            with (logs / f"{each.name}.log").open("wb") as log:
                begun[each.name] = subprocess.Popen(
                    each.command, stdout=log, stderr=subprocess.STDOUT, env=environment
                )
            if not gpus:
                _wait(begun[each.name], end)
        for process in begun.values():
            _wait(process, end)
    finally:
        for process in begun.values():
            if process.poll() is None:
                process.kill()
                process.wait()
    _bring_together(planned, options.work)
    failed = [name for name, process in begun.items() if process.returncode]
    if failed:
        raise CascadeError(
            f"{', '.join(failed)} could not be measured in time; their last words are in {logs}."
        )


def _wait(process: subprocess.Popen[bytes], end: float) -> None:
    try:
        process.wait(max(end - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        process.kill()


def _bring_together(planned: Sequence[Measurement], work: Path) -> None:
    """Writes the figures of all existing parts into their common files, beside the figures already there."""
    found: dict[str, dict] = {}
    for each in planned:
        path = work / "parts" / f"{each.name}.json"
        if path.exists():
            found.setdefault(each.whole, {}).update(json.loads(path.read_text("utf-8")))
    for whole, figures in found.items():
        path = work / f"{whole}.json"
        before = json.loads(path.read_text("utf-8")) if path.exists() else {}
        write_file(path, json.dumps(before | figures, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    names = [f"high_{scale}" for scale in LARGER]
    names += [name for group in (*SETS, *TASK_SETS) for name in group]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", default="", help="numbers of the GPUs, by commas (default: processors)")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--work", type=Path, default=Path("runs/figures"), help="(runs/figures)")
    parser.add_argument("--count", type=int, default=500, help="held-out prompts (default: 500)")
    parser.add_argument("--seconds", type=float, default=1e6, help="seconds until the end at most")
    parser.add_argument("--only", nargs="+", choices=names, help="only these")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        measure(options, [gpu for gpu in options.gpus.split(",") if gpu], options.only or (), options.seconds)
    except CascadeError as error:
        print(error)
    print(f"measured in {time.monotonic() - started:.0f} s; figures are in {options.work}")


if __name__ == "__main__":
    main()
