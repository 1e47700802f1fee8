"""Trains the whole demo cascade: `python -m cascade_nodes.demo.everything --gpus 0,1 --seconds 1000 --weights DIR`.

Each network is a process of its own (`train.py`) with a log of its own in the folder of checkpoints. What is finished
is not done again, what was stopped goes on. A process that fails, or says nothing for long, is begun again from its
last checkpoint, without CUDA graphs, then without compiled blocks too.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.demo.job import FINISHED
from cascade_nodes.demo.train import WEIGHTS

# Turns: networks that train side by side, by GPU (the first or the last of those that there are), and the turn's share
# of the time. The last turn's need the others'.
SIDE_BY_SIDE = (
    ({"compressor": 0, "clip": -1, "stage_a": -1}, 0.27),
    ({"stage_b": 0, "stage_c": -1}, 0.73),
)
IN_TURN = (
    ({"compressor": 0}, 0.14),
    ({"clip": 0}, 0.10),
    ({"stage_a": 0}, 0.08),
    ({"stage_b": 0}, 0.36),
    ({"stage_c": 0}, 0.32),
)
SAFER = ((), ("--no-graphs",), ("--no-graphs", "--no-compile"))
SILENT = 200.0  # seconds without a word after which a process counts as stuck
TELL_EVERY = 20.0
MEASURED = ("adherence", "reconstruction")


@dataclass
class Training:
    """One network's process."""

    network: str
    options: Sequence[str]
    environment: dict[str, str]
    log: Path
    tries: int = 0
    process: subprocess.Popen[bytes] | None = None
    output: IO[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        self.output = self.log.open("ab")
        os.utime(self.log)
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "cascade_nodes.demo.train", self.network,
             *self.options, *SAFER[self.tries]],
            stdout=self.output, stderr=subprocess.STDOUT, env=self.environment,
        )  # fmt: skip

    def running(self) -> bool:
        """Whether it still trains; begins it anew where it failed. Raises CascadeError where nothing helped."""
        assert self.process is not None
        assert self.output is not None
        code = self.process.poll()
        if code is None and time.time() - self.log.stat().st_mtime < SILENT:
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
        return lines[-1] if lines else f"{self.network} begins"


def train_turn(
    networks: dict[str, int], until: float, gpus: Sequence[str], options: argparse.Namespace
) -> None:
    """Trains networks side by side until then (by `time.time`)."""
    common = ["--work", str(options.work), "--weights", str(options.weights), "--until", f"{until:.0f}"]
    trainings = []
    for network, gpu in networks.items():
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": gpus[gpu],
            "TORCHINDUCTOR_CACHE_DIR": str((options.work / "kernels").absolute()),
        }
        log = options.work / f"{network}.log"
        trainings.append(Training(network, [*common, *options.options], environment, log))
    try:
        for training in trainings:
            training.start()
        told = time.monotonic()
        while running := [training for training in trainings if training.running()]:
            time.sleep(0.5)
            if time.monotonic() - told >= TELL_EVERY:
                told = time.monotonic()
                print(" | ".join(training.last_words() for training in running), flush=True)
    finally:
        for training in trainings:
            if training.process is not None and training.process.poll() is None:
                training.stop()
    print(" | ".join(training.last_words() for training in trainings), flush=True)


def train_all(options: argparse.Namespace, gpus: Sequence[str], end: float) -> None:
    """Trains what is not finished yet; the time is shared by the turns that are left."""
    turns = SIDE_BY_SIDE if len(gpus) > 1 else IN_TURN
    left = [
        (
            {name: gpu for name, gpu in networks.items() if not (options.work / name / FINISHED).exists()},
            share,
        )
        for networks, share in turns
    ]
    left = [(networks, share) for networks, share in left if networks]
    for i, (networks, share) in enumerate(left):
        shares = sum(share for _, share in left[i:])
        train_turn(networks, time.time() + (end - time.time()) * share / shares, gpus, options)


def measure(options: argparse.Namespace, gpus: Sequence[str], seconds: float) -> None:
    """Measures the cascade on all GPUs, each measurement a process, none for longer than so many seconds."""
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-m", "cascade_nodes.demo.evaluate", "--weights", str(options.weights),
             "--only", name, "--json", str(options.work / f"{name}.json"),
             *(["--sheet", str(options.work / "sheet.jpg")] if name == "adherence" else [])],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]},
        )
        for i, name in enumerate(MEASURED)
    }  # fmt: skip
    end = time.monotonic() + seconds
    for name, process in processes.items():
        try:
            process.wait(max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            print(f"{name} was not measured in {seconds:.0f} s", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", default="0", help="numbers of the GPUs, by commas (default: 0)")
    parser.add_argument("--seconds", type=float, default=4800, help="for everything (default: 4800)")
    parser.add_argument("--measuring", type=float, default=60, help="seconds of them for the measurement")
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
        measure(options, gpus, max(started + options.seconds - time.time(), options.measuring))


if __name__ == "__main__":
    main()
