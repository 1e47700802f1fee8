"""Runs that are killed, stopped or disturbed go on as if nothing had been."""

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from PIL import Image

from cascade_nodes.cascade_core import CascadeError, writing
from cascade_nodes.cascade_core.checkpoints import files, read_safetensors
from cascade_nodes.cascade_core.training.data import latents
from cascade_nodes.cascade_core.training.log import CURVE, LOG, draw_curve
from cascade_nodes.cascade_core.training.optimisers import build_optimiser
from cascade_nodes.cascade_core.training.run import train
from cascade_nodes.cascade_core.training.state import (
    STATE,
    load_optimiser,
    optimiser_tensors,
    read_state,
    write_state,
)
from cascade_nodes.tests.core.training_runs import (
    TASKS,
    loop_of,
    run_until_killed,
    same,
    settings_of,
    with_steps,
    write_world,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def everything(loop):
    """All that a run ends with."""
    tensors = {f"trained.{name}": value.clone() for name, value in loop.task.trained.state_dict().items()}
    tensors |= {f"run.{name}": value.clone() for name, value in loop.state.items()}
    tensors |= {f"optimiser.{name}": value for name, value in optimiser_tensors(loop.optimiser).items()}
    return tensors | loop.task.buffers()


def test_a_run_that_is_stopped_within_a_step_resumes_bit_for_bit(world, tmp_path):
    """It is stopped between two batches of a step, which is then taken back, its statistics too."""
    name = "lora, adaptive"
    whole = loop_of(settings_of(world, name, tmp_path / "whole"))
    assert whole.run().finished
    questions = iter([False] * 4 + [True])  # two in each step: the fifth is asked within the third
    settings = settings_of(world, name, tmp_path / "stopped")
    stopped = loop_of(settings, stop=lambda: next(questions))
    outcome = stopped.run()
    assert (outcome.step, outcome.finished) == (2, False)
    resumed = loop_of(settings)
    assert resumed.resume()
    assert resumed.run().finished
    assert same(everything(resumed), everything(whole))


@pytest.mark.parametrize("name", TASKS)
def test_a_killed_run_resumes_bit_for_bit(world, tmp_path, name):
    whole = loop_of(settings_of(world, name, tmp_path / "whole"))
    assert whole.run().finished
    settings = settings_of(world, name, tmp_path / "killed")

    run_until_killed(settings, 5 * settings.train.accumulate)
    resumed = loop_of(settings)
    assert resumed.resume()
    assert resumed.step == 3  # the last checkpoint
    assert resumed.run().finished

    assert same(everything(whole), everything(resumed))
    written = []
    for loop in (whole, resumed):
        loop.task.write(loop.state, loop.folder / "out.safetensors", {})
        written.append(read_safetensors(loop.folder / "out.safetensors"))
    assert written[0][1] == written[1][1]
    assert same(written[0][0], written[1][0])


@pytest.fixture(scope="module")
def whole_lora(world, tmp_path_factory):
    """What an undisturbed run of the LoRA ends with."""
    loop = loop_of(settings_of(world, "lora", tmp_path_factory.mktemp("whole")))
    loop.run()
    return everything(loop)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 6, 7])
def test_killed_at_any_step(world, tmp_path, number, whole_lora):
    settings = settings_of(world, "lora", tmp_path / "killed")
    run_until_killed(settings, number)
    resumed = loop_of(settings)
    assert resumed.resume() == (number >= 3)
    resumed.run()
    assert same(whole_lora, everything(resumed))


def test_a_run_that_is_stopped_keeps_its_last_step(world, tmp_path, whole_lora):
    settings = settings_of(world, "lora", tmp_path / "stopped")
    asked = iter([False, False, False, True])
    outcome = loop_of(settings, stop=lambda: next(asked)).run()
    assert (outcome.step, outcome.finished) == (4, False)
    resumed = loop_of(settings)
    assert resumed.resume()
    assert resumed.step == 4
    resumed.run()
    assert same(whole_lora, everything(resumed))


def test_a_run_that_is_stopped_while_latents_are_encoded_goes_on(world, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "ENCODED_AT_ONCE", 1)
    cache = {"cache": str(tmp_path / "cache")}
    settings = settings_of(world, "lora", tmp_path / "run")
    settings = replace(settings, data=replace(settings.data, **cache))
    told, encoded = [], []
    outcome = train(
        settings, told.append, caching=lambda *counts: encoded.append(counts), stop=lambda: bool(encoded)
    )
    assert (outcome.step, outcome.finished) == (0, False)
    assert told == ["Stopped; the same command goes on from here."]
    assert encoded == [(1, 10)]
    encoded.clear()
    assert train(settings, caching=lambda *counts: encoded.append(counts)).finished
    assert encoded[-1] == (9, 9)


def test_a_checkpoint_is_whole_or_the_one_before(world, tmp_path, monkeypatch):
    settings = settings_of(world, "lora", tmp_path)
    calls = []

    @contextmanager
    def disk_gets_full(path, overwrite=True):
        calls.extend([path] * (path.name == STATE))
        with writing.replacing(path, overwrite) as temporary:
            yield temporary
            if len(calls) == 2:
                raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "replacing", disk_gets_full)
    with pytest.raises(CascadeError, match="No space left on device"):
        loop_of(settings).run()
    assert read_state(tmp_path / STATE)[1]["step"] == "3"
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")] == []
    assert loop_of(settings).resume()


def test_the_log_of_a_killed_run_goes_on_from_the_checkpoint(world, tmp_path):
    settings = settings_of(world, "lora", tmp_path, output={"log_every": 1})
    run_until_killed(settings, 5)
    with (tmp_path / LOG).open("a") as file:
        file.write('{"step": 6, "lo')  # the kill came while it was written
    resumed = loop_of(settings)
    resumed.resume()
    resumed.run()
    rows = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert all(row.keys() == {"step", "seconds", "learning_rate", "loss", "epsilon"} for row in rows)
    assert Image.open(tmp_path / CURVE).size == (720, 400)


def test_a_longer_run_goes_on_where_a_shorter_one_ended(world, tmp_path):
    settings = settings_of(world, "lora", tmp_path, train={"schedule": "constant"})
    loop_of(with_steps(settings, 5)).run()
    longer = loop_of(settings)
    assert longer.resume()
    assert longer.step == 5
    assert longer.run().finished


def test_other_settings_of_what_is_trained_are_refused(world, tmp_path):
    loop_of(settings_of(world, "lora", tmp_path)).run()
    other = loop_of(settings_of(world, "lora", tmp_path, lora={"rank": 3}))
    with pytest.raises(CascadeError, match=r"other settings of what is trained .*stage_c.vector.*--fresh"):
        other.resume()


def test_an_optimiser_with_plain_numbers_in_its_state_comes_back(world, tmp_path):
    """bitsandbytes has such states: a step that is not a tensor, bytes with scales, and a table that all share."""
    settings = settings_of(world, "lora", tmp_path).train
    parameters = [torch.nn.Parameter(torch.randn(6)) for _ in range(2)]
    optimiser = build_optimiser([{"params": parameters}], settings)
    table = torch.rand(4)
    for parameter in parameters:
        state = {
            "step": 7,
            "state1": torch.arange(6, dtype=torch.uint8),
            "absmax1": torch.rand(1),
            "qmap1": table,
        }
        optimiser.state[parameter] = state
    write_state(tmp_path / STATE, {"optimiser": optimiser_tensors(optimiser)}, {})
    other = build_optimiser([{"params": parameters}], settings)
    load_optimiser(other, read_state(tmp_path / STATE)[0]["optimiser"], tmp_path / STATE)
    for parameter in parameters:
        held, wanted = other.state[parameter], optimiser.state[parameter]
        assert held["step"] == 7
        assert torch.equal(held["absmax1"], wanted["absmax1"])
        assert torch.equal(held["qmap1"], table)


def test_a_curve_shows_every_order_of_magnitude(tmp_path):
    rows = [{"step": step, "loss": 10.0 ** -(step / 10)} for step in range(1, 40)]
    draw_curve(rows, 40, tmp_path / CURVE)
    picture = Image.open(tmp_path / CURVE).convert("RGB")
    blue = [(x, y) for x in range(720) for y in range(400) if picture.getpixel((x, y)) == (31, 95, 191)]
    left, right = min(blue), max(blue)
    assert left[1] < 80  # the loss begins at the top
    assert right[1] > 320  # and ends at the bottom
