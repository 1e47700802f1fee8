"""Training on a card: passes that are replayed from CUDA graphs give the run that passes without them give."""

from __future__ import annotations

import pytest
import torch

from cascade_nodes.cascade_core.accelerators import capture_stream, side_stream
from cascade_nodes.tests.core.test_training_resume import everything
from cascade_nodes.tests.core.training_runs import (
    TASKS,
    loop_of,
    run_until_killed,
    same,
    settings_of,
    write_world,
)
from cascade_nodes.tests.gpu.conftest import Replays


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory):
    return write_world(tmp_path_factory.mktemp("world"))


def steps(name: str) -> dict:
    """Enough that each of the two buckets is replayed; in the precision that a card trains in by default."""
    return {**TASKS[name].get("train", {}), "steps": 10, "precision": "auto"}


@pytest.mark.parametrize("name", TASKS)
def test_with_graphs_and_without(world, tmp_path, replays: Replays, name):
    if "nf4" in name:
        pytest.importorskip("bitsandbytes", reason="weights in 4 bits are bitsandbytes'")
    dropout = name.startswith("finetune") and "text encoder" not in name  # which draws anew in each step
    loops = []
    for graphs in (False, True):
        train = {**steps(name), "cuda_graphs": graphs}
        loops.append(loop_of(settings_of(world, name, tmp_path / str(graphs), train=train)))
        assert loops[-1].run().finished
        assert (replays.count > 0) == (graphs and not dropout)
    assert same(*map(everything, loops))


@pytest.mark.parametrize("recompute", [False, True], ids=["blocks kept", "blocks computed again"])
@pytest.mark.parametrize("algorithm", ["lora", "lokr"])
def test_dropout_is_drawn_anew_in_each_replay(world, tmp_path, replays: Replays, algorithm, recompute):
    """The weights are those of eager passes, which a capture that drew once for all of its replays would miss."""
    lora = {"algorithm": algorithm, "rank": 4, "rank_dropout": 0.3, "module_dropout": 0.3}
    if algorithm == "lora":
        lora["dropout"] = 0.3
    loops = []
    for graphs in (False, True):
        train = {**steps("lora"), "cuda_graphs": graphs, "gradient_checkpointing": recompute}
        loops.append(loop_of(settings_of(world, "lora", tmp_path / str(graphs), train=train, lora=lora)))
        assert loops[-1].run().finished
        assert (replays.count > 0) == graphs
    assert same(*map(everything, loops))


@pytest.mark.parametrize("name", ["lora", "lora for few steps", "controlnet", "tokens"])
@pytest.mark.parametrize("recompute", [False, True], ids=["blocks kept", "blocks computed again"])
def test_a_killed_run_resumes_bit_for_bit(world, tmp_path, name, recompute):
    """It has no graphs when it goes on, where the run that was not killed has some."""
    train = {**steps(name), "gradient_checkpointing": recompute}
    whole = loop_of(settings_of(world, name, tmp_path / "whole", train=train))
    assert whole.run().finished
    settings = settings_of(world, name, tmp_path / "killed", train=train)
    run_until_killed(settings, 8)
    resumed = loop_of(settings)
    assert resumed.resume()
    assert resumed.run().finished
    assert same(everything(whole), everything(resumed))


def test_no_stream_of_another_thread_is_that_of_captures(device: torch.device):
    """PyTorch's ring of streams comes round: a copy on the stream of a capture would break it."""
    captures = capture_stream(device)
    ring = {torch.cuda.Stream(device) for _ in range(100)}
    assert captures in ring
    assert captures not in {side_stream(device) for _ in range(100)}
