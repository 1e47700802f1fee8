"""Commands in processes of their own, which begin at once: forks of one that has imported everything.

What they leave is compared with what they give when nobody disturbs them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from cascade_nodes.cascade_core.adapters import Adapter, LowRank, write_adapter
from cascade_nodes.cascade_core.checkpoints import read_safetensors
from cascade_nodes.headless.cli import main
from cascade_nodes.tests.core.training_runs import write_world
from cascade_nodes.tests.headless.hub import Hub
from cascade_nodes.tests.headless.record_comfyui import node

REPO = "stabilityai/stable-cascade"
CONTENT = np.random.default_rng(0).bytes(3_000_000)
PICTURES = 6  # of each run of a graph


class Workshop:
    """A folder with tiny networks, pictures, a LoRA and a stand-in for the hub, and what each command gives there."""

    def __init__(self, folder: Path):
        torch.set_num_threads(1)
        self.folder = write_world(folder)
        self.models = str(folder / "models")
        os.environ["CASCADE_MODELS"] = self.models
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        self.hub = Hub({(REPO, "stage_a.safetensors"): CONTENT})
        (folder / "input").mkdir()
        for number in range(PICTURES):
            colour = (number * 40, 255 - number * 40, number)
            Image.new("RGB", (64, 64), colour).save(folder / "input" / f"{number}.png")
        change = LowRank(torch.randn(4, 32), torch.randn(32, 4), 1.0)
        layers = {f"down_blocks.0.2.attention.attn.{part}": change for part in ("to_q", "to_v")}
        write_adapter(folder / "lora.safetensors", Adapter("lora", "kohya", layers), "kohya")

    def graph(self, prefix: str = "a") -> Path:
        """A graph that saves each of the pictures by a node of its own, so that there are many moments to be killed
        at.
        """
        graph = {}
        for number in range(PICTURES):
            graph[f"{number}"] = node("LoadImage", image=f"{number}.png")
            graph[f"s{number}"] = node("SaveImage", images=[f"{number}", 0], filename_prefix=prefix)
        path = self.folder / "graph.json"
        path.write_text(json.dumps(graph))
        return path

    def settings(self, run: str = "run", name: str = "out", **train: object) -> Path:
        """Settings of a training in the folder `run`, whose file goes by `name` in it."""
        models = {
            "stage_c": "tiny_stage_c.safetensors",
            "text_encoder": "tiny_text_encoder",
            "compressor": "tiny_compressor.safetensors",
        }
        values = {
            "data": {"folder": "pictures", "size": 64, "bucket_step": 32, "cache": "cache"},
            "models": models,
            "train": {"steps": 6, "batch_size": 2, "warmup": 0, **train},
            "output": {"file": f"{run}/{name}.safetensors", "folder": run, "checkpoint_every": 1},
        }
        path = self.folder / f"{run}_{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    def forget(self, *names: str) -> None:
        for name in names:
            remove(self.folder / name)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for inner in path.iterdir():
            remove(inner)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def started(arguments: list[str], said: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Begins a command in a fork; returns its process id. What it says goes to the file `said`."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 130  # of an interruption before there is anything to undo, or of a second one
    try:
        for number, handler in (
            (signal.SIGINT, signal.default_int_handler),
            (signal.SIGTERM, signal.SIG_DFL),
        ):
            signal.signal(number, handler)
        stream = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        prepare()
        status = main(arguments)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 98
    except Exception as error:
        sys.stderr.write(f"{type(error).__name__} left main: {error}\n")
        status = 99
    finally:
        os._exit(status)


def ended(pid: int) -> int:
    """Waits for the process; returns its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def undisturbed(arguments: list[str], said: Path) -> float:
    """Runs a command to its end, which must be good; returns the seconds that it took."""
    begun = time.monotonic()
    status = ended(started(arguments, said))
    assert status == 0, f"{arguments[:2]} ended with {status}: {said.read_text()[-400:]!r}"
    return time.monotonic() - begun


def whole_pictures(folder: Path) -> list[bytes]:
    """The pixels of every picture in a folder, all of which must be whole; hidden files are not looked at."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            with Image.open(path) as picture:
                found.append(picture.convert("RGB").tobytes())
    return found


def check_weights(path: Path) -> None:
    """Asserts that a file of weights is there whole, or not at all."""
    if path.exists():
        tensors, _ = read_safetensors(path)
        assert all(torch.isfinite(tensor.float()).all() for tensor in tensors.values()), (
            f"{path.name} holds NaN"
        )


def parts_left(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*.part")]
