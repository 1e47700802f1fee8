"""One training run of the demo: where it reads and writes, on what, for how long; and what the runs share."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cascade_nodes.cascade_core.checkpoints import check_writable, load_model, write_safetensors
from cascade_nodes.cascade_core.networks.layers import AttnBlock, ResBlock, TimestepBlock
from cascade_nodes.cascade_core.networks.stage_a import MixingResidualBlock
from cascade_nodes.cascade_core.text.tokenizer import Tokenizer, build_small_vocabulary, save_vocabulary
from cascade_nodes.cascade_core.training.launch import build_accelerator
from cascade_nodes.cascade_core.training.loop import Loop, TrainingProgress
from cascade_nodes.cascade_core.training.settings import OutputSettings, TrainSettings
from cascade_nodes.demo.captions import vocabulary
from cascade_nodes.demo.dataset import for_compressor, pictures
from cascade_nodes.demo.network_task import NetworkTask, RandomRows, RunSettings
from cascade_nodes.demo.world import Scene, sample_scenes

COMPILED = (ResBlock, AttnBlock, TimestepBlock, MixingResidualBlock)
PART = 8192  # scenes that are drawn at a time
LOG_EVERY, CHECKPOINT_EVERY = 50, 1000  # steps


@dataclass
class Job:
    """One run: where it reads and writes, on what, for how long."""

    settings: TrainSettings
    folder: Path  # checkpoint and log
    weights: Path  # what was trained before
    out: Path  # what this run gives
    device: torch.device
    scenes: int
    minutes: float | None  # stop here, to go on later
    fit: float | None  # choose the number of steps for so many minutes
    compiled: bool

    def __post_init__(self) -> None:
        for folder in (self.folder, self.out):
            check_writable(folder / "network.safetensors")  # before the work

    def train_scenes(self, share: float = 1.0) -> list[Scene]:
        return sample_scenes(max(int(self.scenes * share), 64), seed=self.settings.seed, split="train")

    def compile(self, network: nn.Module) -> nn.Module:
        """Compiles each kind of block once, in place: whole networks take minutes to compile."""
        if self.compiled:
            torch._dynamo.config.cache_size_limit = 64  # kinds of blocks, times widths and sizes
            for block in network.modules():
                if isinstance(block, COMPILED):
                    block.compile()
        return network

    def train(
        self,
        networks: dict[str, nn.Module],
        loss: Callable[[Tensor], dict[str, Tensor]],
        rows: int,
        learning_rates: dict[str, float] | None = None,
    ) -> dict[str, nn.Module]:
        """Train by loss(random indices of so many rows); returns the networks with their averaged weights."""
        task = NetworkTask(networks, loss, self.settings.precision == "bf16", learning_rates)
        settings = RunSettings(self.settings, self._output())
        data = RandomRows(rows, self.settings.seed)
        loop = Loop(task, data, settings, build_accelerator(), self._print_progress)
        loop.resume()
        if self.fit is not None and loop.step < self.settings.warmup:
            self._fit(loop)
        if self.minutes is not None:
            deadline = time.monotonic() + self.minutes * 60
            loop.stop = lambda: time.monotonic() >= deadline
        if loop.stop():
            loop.save()
        else:
            loop.run()
        task.trained.load_state_dict(loop.state)
        task.trained.eval()
        return networks

    def _output(self) -> OutputSettings:
        return OutputSettings(str(self.out), str(self.folder), LOG_EVERY, CHECKPOINT_EVERY)

    def _print_progress(self, progress: TrainingProgress) -> None:
        terms = " ".join(f"{name} {value:.4g}" for name, value in progress.terms.items())
        speed = f"{progress.steps_per_second:.3g} steps/s"
        print(f"{self.folder.name} {progress.step}/{progress.steps} {speed} {terms}", flush=True)

    def _fit(self, loop: Loop) -> None:
        """Set the number of steps so that training takes about `fit` minutes; the warm-up does not depend on it."""
        assert self.fit is not None
        began = time.monotonic()
        self._run_to(loop, 60)  # compiles
        warm = time.monotonic()
        self._run_to(loop, 160)
        left = self.fit * 60 - (time.monotonic() - began)
        steps = max(160 + int(left / (time.monotonic() - warm) * 100), 200)
        loop.settings = self._with_steps(steps)
        print(f"{self.folder.name}: {steps} steps in {self.fit} minutes", flush=True)

    def _run_to(self, loop: Loop, step: int) -> None:
        loop.settings = self._with_steps(step)
        loop.run()

    def _with_steps(self, steps: int) -> RunSettings:
        return RunSettings(replace(self.settings, steps=steps), self._output())

    def load(self, name: str) -> Any:
        path = self.weights / f"demo_{name}.safetensors"
        return load_model(path, dtype=torch.float32, device=self.device)[0]

    def export(self, name: str, kind: str, network: nn.Module, config: dict) -> None:
        """Writes half-precision weights with their configuration."""
        tensors = {
            key: value.half() if value.is_floating_point() else value
            for key, value in network.state_dict().items()
        }
        write_safetensors(self.out / name, tensors, {"kind": kind, "config": json.dumps(config)})


def export_text_encoder(job: Job, model: nn.Module, config: dict, tokenizer: Tokenizer) -> None:
    """The text encoder's folder: weights and its own vocabulary."""
    job.export("demo_text_encoder/model.safetensors", "text_encoder", model, config)
    save_vocabulary(job.out / "demo_text_encoder", *build_small_vocabulary(vocabulary() | {","}))


@torch.no_grad()
def in_parts(function: Callable[[Tensor], Tensor], data: Tensor, size: int = 2048) -> Tensor:
    """function over all rows of data, a part at a time."""
    return torch.cat([function(part) for part in data.split(size)])


def semantic_latents(job: Job, scenes: Sequence[Scene]) -> Tensor:
    """The compressor's latents of the scenes: (N, 16, 6, 6)"""
    compressor = job.load("compressor")
    parts = range(0, len(scenes), PART)
    return torch.cat(
        [
            in_parts(lambda p: compressor(for_compressor(p)), pictures(scenes[i : i + PART], job.device))
            for i in parts
        ]
    )
