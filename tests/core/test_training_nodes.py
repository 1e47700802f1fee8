"""The command on two machines, by both launchers: two nodes on this one, with folders and ports of their own."""

import os
import shutil
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch
import yaml

from cascade_nodes.cascade_core.checkpoints import read_safetensors
from cascade_nodes.cascade_core.training.state import STATE
from cascade_nodes.tests.core.training_runs import write_world

TRAIN = ["-m", "cascade_nodes.headless", "train", "lora", "settings.yaml"]


def launch(kind: str, node: int, port: int) -> list[str]:
    if kind == "torchrun":
        nodes = ["--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1"]
        return [sys.executable, "-m", "torch.distributed.run", *nodes, "--master-addr", "127.0.0.1",
                "--master-port", str(port), *TRAIN]  # fmt: skip
    nodes = ["--num_machines", "2", "--machine_rank", str(node), "--num_processes", "2", "--multi_gpu"]
    return [sys.executable, "-m", "accelerate.commands.launch", *nodes, "--main_process_ip", "127.0.0.1",
            "--main_process_port", str(port), *TRAIN]  # fmt: skip


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def train(worlds, kind: str, run: str, steps: int) -> None:
    for node, process in enumerate(start(worlds, kind, run, steps)):
        told, _ = process.communicate(timeout=300)
        assert process.returncode == 0, told[-3000:]
        assert ("To try it, " in told) == (node == 0)


def start(worlds, kind: str, run: str, steps: int) -> list[subprocess.Popen]:
    port, running = free_port(), []
    for node, world in enumerate(worlds):
        values = {
            "data": {"folder": "pictures", "size": 64, "bucket_step": 32},
            "models": {
                "stage_c": "models/diffusion_models/tiny_stage_c.safetensors",
                "text_encoder": "models/text_encoders/tiny_text_encoder",
                "compressor": "models/stable_cascade/tiny_compressor.safetensors",
            },
            "train": {"steps": steps, "batch_size": 2, "schedule": "constant", "warmup": 0},
            "output": {
                "file": f"{run}/out.safetensors",
                "folder": run,
                "log_every": 1,
                "checkpoint_every": 2,
            },
        }
        (world / "settings.yaml").write_text(yaml.safe_dump(values))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running.append(subprocess.Popen(launch(kind, node, port), cwd=world, env=environment, **pipes))
    return running


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["torchrun", "accelerate"])
def test_two_machines_go_on_from_what_the_first_one_has(tmp_path, kind):
    first = write_world(tmp_path / "first")
    worlds = first, shutil.copytree(first, tmp_path / "second")
    train(worlds, kind, "whole", 4)
    train(worlds, kind, "parts", 2)
    train(worlds, kind, "parts", 4)
    assert (worlds[0] / "parts" / STATE).exists()
    assert not (worlds[1] / "parts" / STATE).exists()
    whole, parts = (read_safetensors(first / run / "out.safetensors")[0] for run in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.nightly
def test_a_machine_that_is_killed_ends_the_other_with_a_sentence(tmp_path):
    first = write_world(tmp_path / "first")
    worlds = first, shutil.copytree(first, tmp_path / "second")
    running = start(worlds, "torchrun", "killed", 100_000)
    while not (first / "killed" / STATE).exists():
        assert running[0].poll() is None
        time.sleep(0.02)
    workers = psutil.Process(running[1].pid).children(recursive=True)
    for process in workers:
        process.kill()
    told = [process.communicate(timeout=300)[0] for process in running]
    assert "error: Process 0 of 2, on " in told[0]
    assert ", has lost another one, which has ended or cannot be reached (" in told[0]
    assert (first / "killed" / STATE).exists()


@pytest.mark.nightly
def test_a_machine_without_a_network_tells_the_other(tmp_path):
    """It never begins the run, for which the other one would wait."""
    first = write_world(tmp_path / "first")
    worlds = first, shutil.copytree(first, tmp_path / "second")
    (worlds[1] / "models/stable_cascade/tiny_compressor.safetensors").unlink()
    running = start(worlds, "torchrun", "without", 2)
    told = [process.communicate(timeout=300)[0] for process in running]
    sentence = "No semantic compressor file 'models/stable_cascade/tiny_compressor.safetensors' was found"
    assert f"error: Process 1 of 2, on {socket.gethostname()}: {sentence}" in told[0]
    assert f"error: {sentence}" in told[1]
    assert not (first / "without").exists()
