"""Mutated settings files of trainings through `cascade train`, on tiny networks, for a step where they are valid."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml

from cascade_nodes.tests.core.training_runs import BACKBONE, write_world
from cascade_nodes.tests.fuzz.values import odd_number, odd_text, odd_value
from cascade_nodes.tests.fuzz.verdict import command

BASIC: dict[str, Any] = {
    "data": {"folder": "pictures", "size": 64, "bucket_step": 32, "cache": "cache"},
    "models": {"stage_c": "tiny_stage_c.safetensors", "text_encoder": "tiny_text_encoder",
    "compressor": "tiny_compressor.safetensors"},
    "train": {"steps": 1, "batch_size": 2, "learning_rate": 0.001, "warmup": 0},
    "output": {"file": "out/new.safetensors", "folder": "run"},
}  # fmt: skip
TASKS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 4, "alpha": 2.0, "targets": ["attention"], "dialect": "kohya", "dtype": "fp32",
    "text_encoder": False, "network": "stage_c"}},
    "controlnet": {"controlnet": {"hint": "canny", "start": "random", "config": BACKBONE}},
    "finetune": {"finetune": {"network": "stage_c", "modules": ["up_blocks.*"], "depth": [0.5, 1.0], "dtype": "fp16",
    "text_encoder": False}},
    "tokens": {"tokens": [{"name": "blob", "initial": "star", "vectors": 1}]},
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {  # keys that are not in the basic file, with values that work
    "data": {"flip": True, "repeat": 1, "caption_dropout": 0.1, "image_prompt_dropout": 0.1, "tars": [],
    "crops": 2, "crop_zoom": 1.5, "masks": "beside", "mask_folder": "pictures", "unmasked_weight": 0.1,
    "unmasked_share": 0.1, "caption": "a star", "caption_suffix": ".txt", "min_bucket_side": 32,
    "max_bucket_side": 128, "sets": [{"folder": "pictures", "masks": "alpha", "size": 64}]},
    "train": {"accumulate": 1, "schedule": "cosine", "final_learning_rate": 0.1, "optimizer": "adamw",
    "weight_decay": 0.01, "betas": [0.9, 0.99],
              "max_grad_norm": 1.0, "ema": 0.5, "seed": 1, "precision": "fp32", "base_weights": "full",
              "gradient_checkpointing": None,
              "compile": False, "deterministic": True, "fsdp": False,
              "stop_at": "2100-01-01 00:00", "stop_after": 1.0},
    "objective": {"kind": "diffusion", "weighting": "p2", "max_loss_weight": 5.0, "pure_noise_share": 0.1,
    "shift": 2.0, "guidance": [2.0, 4.0],
                  "cfg_rescale": 0.7, "solver_steps": 10, "sampling_steps": 5, "on_policy_share": 0.0},
    "output": {"log_every": 1, "checkpoint_every": 1, "sample_every": 1, "prompts": ["a red star"],
    "sample_steps": 1, "sample_cfg": 1.0,
               "sample_shift": 1.0, "sample_sampler": "ddim",
    "save_every": "1 epoch", "keep_last": 1, "raw": True, "log_with": []},
    "validation": {"every": 1, "share": 0.2, "folder": "pictures", "pictures": 2, "times": 1},
    "models": {"previewer": "tiny_previewer.safetensors", "image_encoder": "tiny_vision.safetensors"},
}  # fmt: skip
WORDS = ("p2", "adaptive", "min_snr", "min_snr_gamma", "snr", "sech", "consistency", "random", "compressor",
    "inpainting", "super_resolution", "identity",
         "all", "attention", "up_blocks.*", "(a+)+$", "[", "official", "peft", "embedding", "adamw8bit", "bf16",
         "fp16", "dpmpp_2m", "out", "/", "/etc/passwd",
         "/dev/full", "/proc/x", "out/earlier.safetensors", "x" * 300 + ".safetensors", "a.ckpt",
         "07:30", "1 epoch", "pictures/0.png", "{0..99999999}.tar", "*", "gone")  # fmt: skip
SCALARS = ("2024-01-01", "1:30:00", "0o17", "0x1F", ".inf", "-.inf", ".nan", "~", "1e-4", "1e400",
    "!!binary aGVsbG8=", "!!python/object:os.system x", "!!set {a, b}",
           "!!timestamp 2001-12-14", "!!float 1", "!!int '7'", "&a [*a]", "*gone", "yes", "'\\ud800'",
           '"\\ud800"', '"\\0"', '"\\e[31m"', "!x y", "? a", "<<", "|\n  x",
           "{<<: {steps: 1}}", "[" * 3000 + "]" * 3000, "{a: " * 1500 + "1" + "}" * 1500, "9" * 5000,
           "'" + "x" * 1_000_000 + "'", "{[1, 2]: 3}", "{1: 2}", "{null: 1}")  # fmt: skip
ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30)
)
WHOLE = ("", "null", "[]", "x", "- a", "{", "%YAML 9.9\n---\n{}", "a: 1\n---\nb: 2", "\ufeffdata: {}", "a:\tb",
    "\0", "&a a: *a", "? [a]\n: b", "<<: 1", ALIASES, "data: &d\n  folder: *d",
         "task: lora", "12: 3", "data: {folder: pictures, folder: x}", "{" * 3000, "- " * 5000,
         "#" * 100_000)  # fmt: skip
LARGEST = {"steps": 2, "sample_steps": 2, "accumulate": 2, "solver_steps": 20, "size": 96}


class World:
    def __init__(self, folder: Path):
        self.folder = write_world(folder)
        torch.set_num_threads(1)
        os.environ["CASCADE_MODELS"] = str(folder / "models")
        self.earlier = folder / "out" / "earlier.safetensors"

    def attempt(self, random: Random) -> None:
        """Tries a case, at times where a run of the basic settings has left its state and its cache."""
        self.earlier.parent.mkdir()
        self.earlier.write_bytes(b"earlier")
        task = random.choice(list(TASKS))
        path = self.folder / "settings.yaml"
        try:
            if random.random() < 0.25:
                path.write_text(yaml.safe_dump(BASIC | TASKS[task]))
                command("train", task, str(path))
            path.write_bytes(self.text(task, random))
            self.train(task, path, random)
        finally:
            left = [file.name for file in self.folder.rglob("*.part")]
            for made in ("out", "run", "runs", "cache"):
                shutil.rmtree(self.folder / made, ignore_errors=True)
            assert not left, f"left behind: {left}"

    def train(self, task: str, path: Path, random: Random) -> None:
        refused = True
        try:
            command("train", task, str(path), *(["--fresh"] if random.random() < 0.3 else []))
            refused = False
        finally:
            kept = self.earlier.read_bytes() == b"earlier"
            assert kept or not refused, "an earlier file was lost by a run that was refused"

    def text(self, task: str, random: Random) -> bytes:
        if random.random() < 0.08:
            return random.choice(WHOLE).encode()
        settings = copy.deepcopy(BASIC) | copy.deepcopy(TASKS[task])
        for _ in range(random.choice((0, 1, 2, 4, 8))):
            section = random.choice(list(MORE))
            key = random.choice(list(MORE[section]))
            settings.setdefault(section, {})[key] = MORE[section][key]
        for _ in range(random.choice((0, 1, 1, 1, 2, 3))):
            spoil(settings, random)
        cap(settings)
        try:
            text = yaml.safe_dump(settings, allow_unicode=random.random() < 0.5)
        except (yaml.YAMLError, RecursionError, ValueError):
            text = "data: {folder: " + "[" * 2000 + "]" * 2000 + "}"
        if random.random() < 0.25:
            text = spoiled_text(text, random)
        data = text.encode("utf-8", "surrogatepass")
        if random.random() < 0.05:
            data = random.choice(
                (
                    data[: len(data) // 2],
                    b"\xff" + data,
                    text.encode("utf-16", "surrogatepass"),
                    data.replace(b"\n", b"\r\n"),
                    data.replace(b" ", b"\t"),
                )
            )
        return data


def spoil(settings: dict[str, Any], random: Random) -> None:
    """One value, key or section that is something else."""
    way = random.random()
    section = random.choice(list(settings))
    inside = (
        settings[section][0]
        if isinstance(settings[section], list) and settings[section]
        else settings[section]
    )
    if way < 0.08 or not isinstance(inside, dict) or not inside:
        settings[section] = odd_value(random)
    elif way < 0.14:
        settings.pop(section)
    elif way < 0.2:
        settings[odd_text(random)[:3000]] = odd_value(random)
    elif way < 0.28:
        inside[random.choice((odd_text(random)[:3000], "clip_norm", "step", "own_path"))] = odd_value(random)
    else:
        names = [*inside, *MORE.get(section, {})]
        key = random.choice(names)
        value = inside.get(key, MORE.get(section, {}).get(key))
        number = isinstance(value, int | float | list)
        odd = random.choice(
            (odd_number, odd_number, odd_number, odd_value)
            if number
            else (lambda r: r.choice(WORDS), lambda r: r.choice(WORDS), odd_text, odd_value)
        )
        inside[key] = (
            [odd(random) for _ in value] if isinstance(value, list) and random.random() < 0.6 else odd(random)
        )


def cap(settings: dict[str, Any]) -> None:
    """Makes valid runs short."""
    if isinstance(settings.get("train", {}), dict):
        settings.setdefault("train", {}).setdefault("steps", 1)
    for section in settings.values():
        if isinstance(section, dict):
            for key, largest in LARGEST.items():
                value = section.get(key)
                if (
                    isinstance(value, int | float)
                    and largest < value < 2**40
                    and not (key == "size" and value > 4096)
                ):
                    section[key] = largest


def spoiled_text(text: str, random: Random) -> str:
    lines = text.split("\n")
    row = random.randrange(len(lines))
    name = lines[row].partition(":")[0]
    lines[row] = random.choice(
        (
            f"{name}: {random.choice(SCALARS)}",
            f"{name}: {random.choice(SCALARS)}",
            lines[row] + random.choice(SCALARS),
            "  " + lines[row],
        )
    )
    return "\n".join(lines)
