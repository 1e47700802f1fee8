"""One training run of the demo: its folders, device and duration, and functions shared by the runs."""

import json
import math
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cascade_nodes.cascade_core.checkpoints import check_writable, load_model, write_safetensors
from cascade_nodes.cascade_core.checkpoints.files import read_header, read_safetensors
from cascade_nodes.cascade_core.networks.layers import AttnBlock, ResBlock, TimestepBlock
from cascade_nodes.cascade_core.networks.stage_a import MixingResidualBlock
from cascade_nodes.cascade_core.text.encoder import TextEncoder
from cascade_nodes.cascade_core.text.tokenizer import Tokenizer
from cascade_nodes.cascade_core.text.vocabulary import Merges, build_small_vocabulary
from cascade_nodes.cascade_core.training.launch import build_accelerator
from cascade_nodes.cascade_core.training.loop import Loop, TrainingProgress
from cascade_nodes.cascade_core.training.settings import OutputSettings, TrainSettings
from cascade_nodes.cascade_core.training.state import STATE
from cascade_nodes.cascade_core.vision import ImageEncoder
from cascade_nodes.cascade_core.writing import write_file
from cascade_nodes.demo.captions import vocabulary
from cascade_nodes.demo.captured_loss import Loss
from cascade_nodes.demo.network_task import Batch, NetworkTask, RunSettings, Steps
from cascade_nodes.demo.pool import Pool

COMPILED = (ResBlock, AttnBlock, TimestepBlock, MixingResidualBlock)
PART = 2048  # scenes drawn at a time
LOG_EVERY, CHECKPOINT_EVERY = 25, 2500  # steps
EXPORT_EVERY = 200.0  # seconds between two exports of the average, in a run with a time limit
FINISHED = "finished.json"
FILES = {  # files that a run's networks are exported to, by their names in the run
    "stage_a": "demo_stage_a.safetensors",
    "compressor": "demo_compressor.safetensors",
    "previewer": "demo_previewer.safetensors",
    "text": "demo_text_encoder/model.safetensors",
    "image": "demo_image_encoder.safetensors",
    "stage_b": "demo_stage_b.safetensors",
    "stage_c": "demo_stage_c.safetensors",
}
SPENT = "seconds"  # in a state's contents: how long the run has trained
TOKEN_ROWS = "text_model.embeddings.token_embedding.weight"
MANY_STEPS = 10_000_000  # limit for a run that ends by time

Weights = Mapping[str, Mapping[str, Tensor]]  # averaged tensors by network and name
Export = Callable[[Weights], None]
Draw = Callable[[int], Batch]


@dataclass
class Job:
    """One run: its folders, device and duration.

    minutes   pause after this time, to go on later
    fit       train for this many minutes in all, instead of a number of steps
    until     train until this `time.time`, instead of for a number of steps
    waits     whether to wait for needed networks that other processes are training
    start     folder of exported weights to start from, instead of random ones
    checkpoint_every   steps
    trained_steps      of the networks at an export
    """

    settings: TrainSettings
    folder: Path  # checkpoint and log
    weights: Path  # networks trained before
    out: Path  # the run's results
    device: torch.device
    scenes: int
    minutes: float | None = None
    fit: float | None = None
    until: float | None = None
    compiled: bool = False
    graphs: bool = False
    waits: bool = False
    start: Path | None = None
    checkpoint_every: int = CHECKPOINT_EVERY
    trained_steps: int = 0

    def __post_init__(self) -> None:
        for folder in (self.folder, self.out):
            check_writable(folder / "network.safetensors")  # before the work

    @property
    def by_clock(self) -> bool:
        return self.fit is not None or self.until is not None

    def seed(self, *what: object) -> int:
        """A different seed for each kind of data, far from those of the measurements."""
        return 1_000_000 + zlib.crc32(repr((self.settings.seed, *what)).encode())

    def pool(
        self,
        draw: Callable[[int, int], Sequence[Tensor]],
        share: float,
        first: float = 0.25,
        every: int = 50,
        endless: bool = False,
    ) -> Pool:
        """Data with a share of the run's number of scenes as rows; draw(number, rows) gives a part.

        first: share of it that is drawn before the first step; every, endless: of `Pool`.
        """
        rows = max(int(self.scenes * share), 16)
        size = min(PART, rows)
        parts = rows // size
        return Pool(lambda number: draw(number, size), parts, max(round(parts * first), 1), every, endless)

    def compile(self, network: nn.Module) -> nn.Module:
        """Compiles each kind of block once, in place: whole networks take minutes to compile."""
        if self.compiled:
            for block in network.modules():
                if isinstance(block, COMPILED):
                    block.compile(dynamic=False)
        return network

    def compile_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False) if self.compiled else function

    def train(
        self,
        networks: dict[str, nn.Module],
        prepare: Callable[[], Draw],
        loss: Loss,
        export: Export,
        learning_rates: dict[str, float] | None = None,
        rehearsals: Iterable[Sequence[Tensor]] = (),
        needed: int = 1,
        inputs: Sequence[str] = (),
    ) -> None:
        """Trains by loss(*draw(step)), and writes the networks with their averaged weights by `export`.

        prepare: makes the data, after its `inputs` (other networks) have been trained, and returns `draw`
        rehearsals: batches of arbitrary values, whose shapes are compiled and captured beforehand: the first `needed`
        always, the others while waiting for the inputs
        """
        bf16 = self.settings.precision == "bf16"
        task = NetworkTask(networks, _nothing_yet, loss, bf16, learning_rates, self.graphs)
        if self.graphs:
            for number, tensors in enumerate(rehearsals):
                if number >= needed and self._are_there(inputs):
                    break
                task.rehearse(tensors)
        if self.start is not None:
            self._begin_with(self.start, networks)
        self._wait_for(inputs)
        task.draw = prepare()
        loop = Loop(task, Steps(), self.run_settings(), build_accelerator(), self._print_progress)
        spent = 0.0
        if loop.resume():
            spent = self._spent()
            print(f"{self.folder.name}: goes on from step {loop.step}, after {spent:.0f} s", flush=True)

        def write() -> None:
            self.trained_steps = loop.step
            export(_by_network(loop.state))

        clock = Clock(self, loop, spent, write)
        loop.stop = clock.ended
        if clock.ended():
            loop.save()
        else:
            loop.settings = self.run_settings()
            loop.run()
        write()
        if clock.finished:
            figures = {"steps": loop.step, "seconds": round(clock.spent)}
            write_file(self.folder / FINISHED, json.dumps(figures) + "\n")
        if self.device.type == "cuda":
            gigabytes = torch.cuda.max_memory_allocated(self.device) / 1e9
            print(f"{self.folder.name}: {gigabytes:.1f} GB at most", flush=True)

    @torch.no_grad()
    def _begin_with(self, folder: Path, networks: Mapping[str, nn.Module]) -> None:
        """Copies exported weights of the same names and shapes into the networks; other weights are unchanged.

        Tokens are matched by their spelling, since the files may be of an earlier vocabulary.
        """
        for name, network in networks.items():
            path = folder / FILES.get(name, name)
            if not path.is_file():
                continue
            own, given = network.state_dict(), read_safetensors(path)[0]
            if TOKEN_ROWS in given and TOKEN_ROWS in own:
                given[TOKEN_ROWS] = rows_by_token(given[TOKEN_ROWS], own[TOKEN_ROWS], path.parent)
            fitting = [key for key, value in given.items() if key in own and own[key].shape == value.shape]
            for key in fitting:
                own[key].copy_(given[key])
            print(
                f"{self.folder.name}: begins with {len(fitting)} of {len(own)} tensors of {path}", flush=True
            )

    def _are_there(self, inputs: Sequence[str]) -> bool:
        return not self.waits or all((self.folder.parent / name / FINISHED).exists() for name in inputs)

    def _wait_for(self, inputs: Sequence[str]) -> None:
        told = -math.inf
        while not self._are_there(inputs):
            if time.monotonic() - told > 15:
                told = time.monotonic()
                print(f"{self.folder.name}: waits for {' '.join(inputs)}", flush=True)
            time.sleep(0.2)
        print(f"{self.folder.name}: its data is made", flush=True)

    def _spent(self) -> float:
        metadata = read_header(self.folder / STATE).metadata
        return float(json.loads(metadata.get("contents", "{}")).get(SPENT, 0))

    def run_settings(self, steps: int | None = None) -> RunSettings:
        output = OutputSettings(str(self.out), str(self.folder), LOG_EVERY, self.checkpoint_every)
        if steps is None:
            steps = MANY_STEPS if self.by_clock else self.settings.steps
        return RunSettings(replace(self.settings, steps=steps), output)

    def _print_progress(self, progress: TrainingProgress) -> None:
        terms = " ".join(f"{name} {value:.4g}" for name, value in progress.terms.items())
        speed = f"{progress.steps_per_second:.3g} steps/s"
        print(f"{self.folder.name} {progress.step}/{progress.steps} {speed} {terms}", flush=True)

    def load(self, name: str) -> Any:
        path = self.weights / f"demo_{name}.safetensors"
        return load_model(path, dtype=torch.float32, device=self.device)[0]

    def text_encoder(self) -> TextEncoder:
        return TextEncoder.load(self.weights / "demo_text_encoder", dtype=torch.float32)

    def image_encoder(self) -> ImageEncoder:
        return ImageEncoder.load(self.weights / "demo_image_encoder.safetensors", dtype=torch.float32)

    def export(self, name: str, kind: str, tensors: Mapping[str, Tensor], config: dict, **more: str) -> None:
        """Writes half-precision weights with their configuration. more: further metadata"""
        half = {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()}
        write_safetensors(self.out / name, half, {"kind": kind, "config": json.dumps(config), **more})


class Clock:
    """Ends a run at its time, with the learning rate lowered by then.

    A run with a time limit has no number of steps; the schedule of the learning rate gets the number expected at the
    present pace, so that it follows the share of time that has passed.
    """

    def __init__(self, job: Job, loop: Loop, spent: float, export: Callable[[], None]):
        self.job, self.loop, self.before, self.export = job, loop, spent, export
        self.began = self.exported = time.monotonic()
        self.total: float | None = None
        if job.fit is not None:
            self.total = job.fit * 60
        elif job.until is not None:
            self.total = spent + max(job.until - time.time(), 0)

    @property
    def spent(self) -> float:
        return self.before + time.monotonic() - self.began

    @property
    def finished(self) -> bool:
        if self.total is None:
            return self.loop.step >= self.job.settings.steps
        return self.spent >= self.total

    def ended(self) -> bool:
        """Whether the run ends at this step; called after each step."""
        spent, job = self.spent, self.job
        self.loop.contents[SPENT] = f"{spent:.1f}"
        if self.total is not None:
            if self.loop.step % 10 == 0 or self.loop.step < 10:
                share = min(max(spent / self.total, 1e-4), 1.0) if self.total else 1.0
                self.loop.settings = job.run_settings(max(math.ceil(self.loop.step / share), 1))
            if time.monotonic() - self.exported > EXPORT_EVERY:
                self.export()
                self.exported = time.monotonic()
        return self.finished or (job.minutes is not None and spent - self.before >= job.minutes * 60)


def _nothing_yet(step: int) -> Batch:
    raise NotImplementedError


def _by_network(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors of a module of networks, by network and name."""
    networks: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        network, _, rest = name.partition(".")
        networks.setdefault(network, {})[rest] = value
    return networks


def own_vocabulary() -> tuple[dict[str, int], Merges]:
    return build_small_vocabulary(vocabulary() | {","})


def own_tokenizer() -> Tokenizer:
    return Tokenizer.from_vocabulary(*own_vocabulary())


def rows_by_token(rows: Tensor, own: Tensor, folder: Path) -> Tensor:
    """Token embeddings (M, C) of the vocabulary in a folder -> (N, C) of our own; tokens that it lacks keep theirs."""
    others, ours = (t.backend.get_vocab() for t in (Tokenizer.from_folder(folder), own_tokenizer()))
    shared = [token for token in ours if token in others]
    matched = own.clone()
    matched[[ours[token] for token in shared]] = rows[[others[token] for token in shared]].to(own)
    return matched


@torch.no_grad()
def in_parts(function: Callable[[Tensor], Tensor], data: Tensor, size: int = 1024) -> Tensor:
    """Applies a function to all rows of data, a part at a time."""
    return torch.cat([function(part) for part in data.split(size)])
