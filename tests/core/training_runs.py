"""Runs of every task on a tiny cascade and a few pictures, for the tests of training."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from cascade_nodes.cascade_core.checkpoints import load_model
from cascade_nodes.cascade_core.training.launch import build_accelerator
from cascade_nodes.cascade_core.training.loop import Batches, Loop
from cascade_nodes.cascade_core.training.run import prepare
from cascade_nodes.cascade_core.training.settings import Settings
from cascade_nodes.cascade_core.training.typed_yaml import build
from cascade_nodes.tests.nodes.tiny import CONFIGS, FOLDERS, save, write_cascade

CAPTIONS = ["a red star", "a blue [blob]", "the large star on the red [blob]", "a small circle", ""]
VALUES: dict[str, Any] = {
    "data": {"size": 64, "bucket_step": 32},
    "train": {
        "steps": 8,
        "batch_size": 3,
        "learning_rate": 3e-3,
        "warmup": 2,
        "ema": 0.5,
        "precision": "fp32",
    },
    "output": {"log_every": 2, "checkpoint_every": 3},
}
BACKBONE = {name: CONFIGS["compressor"][name] for name in ("stem", "stages", "c_last")}
TASKS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora with text": {"lora": {"text_encoder": True, "rank": 4, "alpha": 2.0}},
    "lora with tokens": {
        "lora": {"dialect": "comfyui"},
        "tokens": [{"name": "blob", "initial": "star"}],
        "train": {"learning_rate": 1e-2},
    },
    "lora for few steps": {"objective": {"kind": "consistency", "guidance": [2, 4], "solver_steps": 10}},
    "lora, adaptive": {
        "objective": {"weighting": "adaptive"},
        "train": {"accumulate": 2, "max_grad_norm": 0.5},
    },
    "lora with image prompts": {"data": {"image_prompt_dropout": 0.2}},
    "lora for few steps with image prompts": {"objective": {"kind": "consistency", "solver_steps": 10}},
    "lora over int8": {"train": {"base_weights": "int8"}},
    "lora over nf4": {"train": {"base_weights": "nf4"}, "lora": {"dora": True}},
    "controlnet": {"train": {"learning_rate": 1e-2}},
    "controlnet with image prompts": {"train": {"learning_rate": 1e-2}},
    "controlnet from nothing": {"controlnet": {"hint": "inpainting", "start": "random", "config": BACKBONE}},
    "finetune": {},
    "finetune of some": {"finetune": {"modules": ["up_blocks.*"]}, "train": {"ema": 0.0}},
    "finetune with text": {"finetune": {"text_encoder": True, "depth": [0.5, 1]}},
    "lora of stage b": {"lora": {"network": "stage_b"}, "data": {"flip": True, "size": 128}},
    "finetune of stage b": {"finetune": {"network": "stage_b"}, "stage_b": {"scales": [0.75], "noise": 0.1}},
    "lora of the text encoder": {"lora": {"network": "text_encoder"}},
    "finetune of the text encoder": {"finetune": {"network": "text_encoder", "modules": ["*.layers.1"]}},
    "tokens": {
        "tokens": [{"name": "blob", "initial": "star", "vectors": 2}],
        "train": {"learning_rate": 3e-2},
    },
}


def write_world(folder: Path) -> Path:
    """`models` with a tiny cascade, whose compressor makes latents of variance 1, and `pictures` with captions.

    Those of even numbers have an image prompt, two of them a second one, which runs without an image encoder leave.
    """
    write_cascade(folder / "models")
    settle_compressor(folder / "models" / FOLDERS["compressor"] / "tiny_compressor.safetensors")
    (folder / "pictures").mkdir()
    random = np.random.default_rng(0)
    for number in range(10):
        width, height = (80, 80) if number < 6 else (110, 64)
        small = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((width, height), Image.Resampling.NEAREST).save(folder / "pictures" / f"{number}.png")
        (folder / "pictures" / f"{number}.txt").write_text(CAPTIONS[number % len(CAPTIONS)])
        for prompt in range((number in (2, 6)) + (number % 2 == 0)):
            small.rotate(90).save(folder / "pictures" / f"{number}.prompt{prompt}.png")
    return folder


def settle_compressor(path: Path) -> None:
    """Gives its batch norms the statistics of random pictures, layer by layer."""
    network, _, config = load_model(path, "compressor", torch.float32)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all that comes
    pictures = F.interpolate(torch.rand(32, 3, 6, 6, generator=torch.Generator().manual_seed(0)), (96, 96))
    with torch.no_grad():
        network.train()(pictures)
    save(path, network, {"kind": "compressor", "config": json.dumps(config)})


def settings_of(world: Path, name: str, run: Path, **sections: Any) -> Settings:
    """The settings of an entry of TASKS, resolved; its run goes to `run`."""
    models = world / "models"
    files = {
        "stage_c": models / "diffusion_models" / "tiny_stage_c.safetensors",
        "text_encoder": models / "text_encoders" / "tiny_text_encoder",
        "compressor": models / "stable_cascade" / "tiny_compressor.safetensors",
        "previewer": models / "vae" / "tiny_previewer.safetensors",
    }
    if "image prompts" in name:
        files["image_encoder"] = models / "clip_vision" / "tiny_vision.safetensors"
    if "stage b" in name:
        files["stage_b"] = models / "unet" / "tiny_stage_b.safetensors"
        files["stage_a"] = models / "vae" / "tiny_stage_a.safetensors"
    values: dict[str, Any] = {
        "task": name.split()[0].rstrip(","),
        "models": {k: str(v) for k, v in files.items()},
    }
    for changes in (VALUES, TASKS[name], sections):
        for section, given in changes.items():
            values[section] = given if isinstance(given, list) else {**values.get(section, {}), **given}
    values["data"] = {**values["data"], "folder": str(world / "pictures"), "cache": str(world / "cache")}
    values["output"] = {**values["output"], "folder": str(run), "file": str(run / "out.safetensors")}
    return build(Settings, values)


def loop_of(settings: Settings, **arguments: Any) -> Loop:
    """A loop that stands before its first step."""
    torch.manual_seed(99)  # what went before shall not matter
    loop = prepare(settings, build_accelerator(settings.train.precision))
    for name, value in arguments.items():
        setattr(loop, name, value)
    return loop


class Dying:
    """Batches that end the run, as a kill would, where one is asked for."""

    def __init__(self, data: Batches, number: int):
        self.data, self.number = data, number

    def batch(self, step, batch_size, rank=0, ranks=1):
        if step >= self.number:
            raise KeyboardInterrupt
        return self.data.batch(step, batch_size, rank, ranks)


def run_until_killed(settings: Settings, number: int) -> None:
    """Runs a training that is killed where the batch of this number is asked for."""
    killed = loop_of(settings)
    killed.data = Dying(killed.data, number)
    with pytest.raises(KeyboardInterrupt):
        killed.run()


def with_steps(settings: Settings, steps: int) -> Settings:
    return replace(settings, train=replace(settings.train, steps=steps))


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
