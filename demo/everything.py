"""Trains the whole demo cascade: `python -m cascade_nodes.demo.everything --gpus 0,1 --seconds 1000 --weights DIR`.

Each network is trained by its own process (`train.py`), with its own log in the folder of checkpoints. On two GPUs
all processes start at once, and those that need other networks compile their kernels until these are trained; on one
GPU they take turns. Finished networks are skipped, and interrupted ones are resumed. A process that fails, or is
silent for long, is restarted from its last checkpoint without compiled blocks, and then also without CUDA graphs.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.demo import figures
from cascade_nodes.demo.job import FINISHED
from cascade_nodes.demo.train import WEIGHTS


class Place(NamedTuple):
    """A network's GPU, and the share of the time at which its training ends."""

    gpu: int  # the first or the last of the given ones
    until: float


# CLIP has its own GPU. Stage A needs fewer steps than the others.
SIDE_BY_SIDE = {
    "compressor": Place(0, 0.36),
    "clip": Place(-1, 0.30),
    "layout": Place(-1, 0.36),
    "vision": Place(0, 0.36),
    "stage_a": Place(0, 0.16),
    "stage_b": Place(0, 1.0),
    "stage_c": Place(-1, 1.0),
}
IN_TURN = {
    "compressor": Place(0, 0.14),
    "clip": Place(0, 0.27),
    "layout": Place(0, 0.30),
    "vision": Place(0, 0.33),
    "stage_a": Place(0, 0.38),
    "stage_b": Place(0, 0.68),
    "stage_c": Place(0, 1.0),
}
WAITING = "layout", "vision", "stage_b", "stage_c"  # for others, which train beside them
SAFER = ((), ("--no-compile",), ("--no-compile", "--no-graphs"))
SILENT_WAITING, SILENT = 240.0, 120.0  # seconds without output after which a process counts as stuck
TELL_EVERY = 20.0
MEASURED = "adherence", "reconstruction", "renderer"


@dataclass
class Training:
    """One network's process, which runs a module.

    due: time (of `time.time`) by which it should be training and no longer wait for other networks
    """

    network: str
    options: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    due: float
    module: str = "train"
    tries: int = 0
    process: subprocess.Popen[bytes] | None = None
    output: IO[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        self.output = self.log.open("ab")
        os.utime(self.log)
        command = [sys.executable, "-u", "-m", f"cascade_nodes.demo.{self.module}", self.network]
        self.process = subprocess.Popen(
            [*command, *self.options, *SAFER[self.tries]],
            stdout=self.output, stderr=subprocess.STDOUT, env=dict(self.environment),
        )  # fmt: skip

    def running(self) -> bool:
        """Whether it still trains. Restarts a failed process; raises CascadeError after the last attempt."""
        assert self.process is not None
        assert self.output is not None
        code, now = self.process.poll(), time.time()
        patience = SILENT_WAITING if now < self.due + SILENT else SILENT
        if code is None and now - self.log.stat().st_mtime < patience:
            return True
        if code is None:
            self.stop()
        self.output.close()
        if code == 0:
            return False
        self.tries += 1
        if self.tries == len(SAFER):
            raise CascadeError(f"The training of {self.network} failed; its last words are in {self.log}.")
        print(f"{self.network} failed ({code}); again with {' '.join(SAFER[self.tries])}", flush=True)
        self.start()
        return True

    def stop(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def last_words(self) -> str:
        lines = self.log.read_bytes()[-2000:].decode(errors="replace").strip().splitlines()
        return lines[-1][:160] if lines else f"{self.network} begins"


def train_together(lanes: Sequence[Sequence[Training]]) -> None:
    """Trains lanes of networks side by side, those of a lane one after the other, and reports progress."""
    lanes = [list(lane) for lane in lanes]
    begun: list[Training] = []
    try:
        told = time.monotonic()
        while True:
            running: list[Training] = []
            for lane in lanes:
                while lane:
                    if lane[0] not in begun:
                        begun.append(lane[0])
                        lane[0].start()
                    if lane[0].running():
                        running.append(lane[0])
                        break
                    lane.pop(0)
            if not running:
                break
            time.sleep(0.5)
            if time.monotonic() - told >= TELL_EVERY:
                told = time.monotonic()
                print(" | ".join(training.last_words() for training in running), flush=True)
    finally:
        for training in begun:
            if training.process is not None and training.process.poll() is None:
                training.stop()
    print(" | ".join(training.last_words() for training in begun), flush=True)


def train_all(options: argparse.Namespace, gpus: Sequence[str], end: float) -> None:
    """Trains the unfinished networks, among which the time of finished ones is divided."""
    together = len(gpus) > 1
    places = {
        name: place
        for name, place in (SIDE_BY_SIDE if together else IN_TURN).items()
        if not (options.work / name / FINISHED).exists()
    }
    began, seconds = time.time(), end - time.time()
    first = 0.0  # share of the time freed by finished networks
    if together:
        first = 0.0 if places.keys() - {"stage_b", "stage_c"} else SIDE_BY_SIDE["layout"].until
    threads = max((os.cpu_count() or 1) // (len(places) + 1), 2) if together else os.cpu_count() or 1
    trainings = []
    for name, place in places.items():
        until = began + seconds * (place.until - first) / (1 - first)
        waits = ["--wait"] if together and name in WAITING else []
        trainings.append(
            Training(
                name,
                ["--work", str(options.work), "--weights", str(options.weights), "--until", f"{until:.0f}", *waits,
                 *options.options],
                {**os.environ, "CUDA_VISIBLE_DEVICES": gpus[place.gpu],
                 "TORCHINDUCTOR_CACHE_DIR": str((options.work / "kernels").absolute()),
                 "TORCHINDUCTOR_COMPILE_THREADS": str(threads)},
                options.work / f"{name}.log",
                began + seconds * SIDE_BY_SIDE["layout"].until * bool(waits) * (first == 0),
            )
        )  # fmt: skip
    train_together([[training] for training in trainings] if together else [trainings])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", default="0", help="numbers of the GPUs, by commas (default: 0)")
    parser.add_argument("--seconds", type=float, default=4800, help="for everything (default: 4800)")
    parser.add_argument("--measuring", type=float, default=60, help="seconds of them for the measurement")
    parser.add_argument("--count", type=int, default=500, help="held-out prompts to measure (default: 500)")
    parser.add_argument(
        "--work", type=Path, default=Path("runs"), help="checkpoints and logs (default: runs)"
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where the networks go")
    parser.add_argument(
        "options", nargs="*", help="after --: options of each network's training, such as --scenes 20000"
    )
    options = parser.parse_args(arguments)
    started = time.time()
    gpus = options.gpus.split(",")
    for folder in (options.work, options.weights):
        folder.mkdir(parents=True, exist_ok=True)
    train_all(options, gpus, started + options.seconds - options.measuring)
    print(f"trained in {time.time() - started:.0f} s", flush=True)
    if options.measuring:
        seconds = max(started + options.seconds - time.time(), options.measuring)
        try:
            figures.measure(options, gpus, MEASURED, seconds)
        except CascadeError as error:
            print(error)
        print(f"figures are in {options.work}", flush=True)


if __name__ == "__main__":
    main()
