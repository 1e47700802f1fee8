"""One training run of the demo: where it reads and writes, on what, for how long; and what the runs share."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cascade_nodes.cascade_core.checkpoints import load_model, write_safetensors
from cascade_nodes.cascade_core.networks.layers import AttnBlock, ResBlock, TimestepBlock
from cascade_nodes.cascade_core.networks.stage_a import MixingResidualBlock
from cascade_nodes.cascade_core.text.tokenizer import Tokenizer, build_small_vocabulary, save_vocabulary
from cascade_nodes.cascade_core.training.trainer import Settings, Trainer
from cascade_nodes.demo.captions import vocabulary
from cascade_nodes.demo.dataset import for_compressor, pictures
from cascade_nodes.demo.world import Scene, sample_scenes

COMPILED = (ResBlock, AttnBlock, TimestepBlock, MixingResidualBlock)
PART = 8192  # scenes that are drawn at a time


@dataclass
class Job:
    """One run: where it reads and writes, on what, for how long."""

    settings: Settings
    folder: Path  # checkpoint and log
    weights: Path  # what was trained before
    out: Path  # what this run gives
    device: torch.device
    scenes: int
    minutes: float | None  # stop here, to go on later
    fit: float | None  # choose the number of steps for so many minutes
    compiled: bool

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

    def batch(self, data: Tensor) -> Tensor:
        """Random row numbers of `data`; the trainer seeds each step."""
        return torch.randint(len(data), (self.settings.batch_size,)).to(data.device)

    def train(
        self, networks: dict[str, nn.Module], loss: Callable, groups: dict[str, float] | None = None
    ) -> nn.ModuleDict:
        """Runs the trainer and gives the averaged networks."""
        trainer = Trainer(networks, self.settings, self.folder, groups)
        trainer.resume()
        if self.fit is not None and trainer.step < self.settings.warmup:
            self._fit(trainer, loss)
        trainer.run(loss, minutes=self.minutes)
        return trainer.average

    def _fit(self, trainer: Trainer, loss: Callable) -> None:
        """Sets the number of steps so that training takes about `fit` minutes; the warm-up does not depend on it."""
        assert self.fit is not None
        began = time.monotonic()
        trainer.run(loss, until=60)  # compiles
        warm = time.monotonic()
        trainer.run(loss, until=160)
        left = self.fit * 60 - (time.monotonic() - began)
        steps = 160 + int(left / (time.monotonic() - warm) * 100)
        trainer.settings = replace(self.settings, steps=max(steps, 200))
        print(f"{self.folder.name}: {trainer.settings.steps} steps in {self.fit} minutes", flush=True)

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
