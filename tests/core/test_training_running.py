"""Held-out pictures, files on the way, raw weights beside the average, trackers, and runs that stop at a time."""

import json
import re
import shutil
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.checkpoints import read_safetensors
from cascade_nodes.cascade_core.training import trackers
from cascade_nodes.cascade_core.training.checks import check_networks
from cascade_nodes.cascade_core.training.data.access import Access
from cascade_nodes.cascade_core.training.data.held_out import find_and_hold_out
from cascade_nodes.cascade_core.training.deadline import stop_time, stopping
from cascade_nodes.cascade_core.training.log import CURVE, LOG, draw_curve
from cascade_nodes.cascade_core.training.ranges import in_steps
from cascade_nodes.cascade_core.training.run import train
from cascade_nodes.cascade_core.training.settings import (
    DataSettings,
    OutputSettings,
    TrainSettings,
    ValidationSettings,
)
from cascade_nodes.cascade_core.training.typed_yaml import build
from cascade_nodes.tests.core.training_runs import (
    loop_of,
    run_until_killed,
    same,
    settings_of,
    write_world,
)

HELD_OUT = {"share": 0.3, "every": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def validated(run) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / LOG).read_text().splitlines()]
    return {row["step"]: row["validation"] for row in rows if "validation" in row}


@pytest.mark.parametrize(
    "name",
    [
        "lora",
        "lora of stage b",
        *(
            pytest.param(name, marks=pytest.mark.nightly)
            for name in ("controlnet", "finetune", "finetune of stage b", "tokens")
        ),
    ],
)
def test_the_error_on_held_out_pictures_is_measured_and_changes_nothing(world, tmp_path, name):
    """A run that measures and one whose pictures lie elsewhere train the same; killed, it goes on to the bit."""
    settings = settings_of(world, name, tmp_path / "run", validation=HELD_OUT, train={"steps": 5})
    loop = loop_of(settings)
    assert loop.run().finished
    errors = validated(tmp_path / "run")
    assert list(errors) == [0, 2, 4]
    assert len(set(errors.values())) == 3  # the network changes

    killed = replace(settings, output=replace(settings.output, folder=str(tmp_path / "killed")))
    run_until_killed(killed, 4)
    resumed = loop_of(killed)
    assert resumed.resume()
    assert resumed.run().finished
    assert same(resumed.task.trained.state_dict(), loop.task.trained.state_dict())
    assert validated(tmp_path / "killed") == errors

    seldom = replace(settings, validation=replace(settings.validation, every=4))
    seldom = replace(seldom, output=replace(settings.output, folder=str(tmp_path / "seldom")))
    other = loop_of(seldom)
    other.run()
    assert same(other.task.trained.state_dict(), loop.task.trained.state_dict())


def test_held_out_errors_can_be_compared_between_runs(world, tmp_path):
    """Before its first step a LoRA is Stage C: whatever the seed, the weighting and the batch size."""
    first = loop_of(settings_of(world, "lora", tmp_path / "a", validation=HELD_OUT))
    other = loop_of(
        settings_of(
            world,
            "lora",
            tmp_path / "b",
            validation=HELD_OUT,
            train={"seed": 5, "batch_size": 1},
            data={"caption_dropout": 0.9, "flip": True, "crops": 2, "shuffle_tags": True},
            objective={"weighting": "debiased", "noise_offset": 0.5, "shift": 2.0},
            lora={"rank": 2, "dropout": 0.5},
        )
    )
    assert first.validate is not None
    assert other.validate is not None
    error = first.validate[1](first.state)
    assert other.validate[1](other.state) == pytest.approx(error, rel=1e-4)
    assert first.validate[1](first.state) == error


def test_held_out_errors_of_stage_b_depend_on_pictures_and_network_alone(world, tmp_path):
    """Measured with what Stage C makes of a picture, not with what is drawn for the training."""
    errors = []
    for number, stage_b in enumerate(({}, {"scales": [0.5], "dropout": 1.0, "noise": 3.0})):
        settings = settings_of(
            world,
            "lora of stage b",
            tmp_path / str(number),
            validation=HELD_OUT,
            train={"seed": number, "batch_size": 1 + 2 * number},
            stage_b=stage_b,
        )
        loop = loop_of(settings)
        assert loop.validate is not None
        errors.append(loop.validate[1](loop.state))
        assert loop.validate[1](loop.state) == errors[-1]
    assert errors[1] == pytest.approx(errors[0], rel=1e-4)


def test_no_picture_is_both_trained_and_measured_on(world):
    data = DataSettings(folder=str(world / "pictures"))
    found = find_and_hold_out(data, build(ValidationSettings, HELD_OUT), Access())
    names = {each.name for each in found.trained}, {each.name for each in found.held_out}
    assert (len(names[0]), len(names[1])) == (7, 3)
    assert not names[0] & names[1]
    with pytest.raises(CascadeError, match="holds out all of 10 pictures"):
        find_and_hold_out(data, ValidationSettings(folder=data.folder, every=1), Access())


def test_the_curve_shows_the_held_out_error(world, tmp_path):
    for name, validation in (("plain", {}), ("held out", HELD_OUT)):
        run = tmp_path / name
        loop_of(settings_of(world, "lora", run, validation=validation, train={"steps": 4})).run()
        assert Image.open(run / CURVE).size == (720, 400)
        assert (orange_pixels(run / CURVE) > 0) == bool(validation)
    rows: list[dict[str, Any]] = [{"step": step, "loss": 1 / step} for step in range(1, 41)]
    draw_curve(rows, 40, tmp_path / CURVE)
    assert orange_pixels(tmp_path / CURVE) == 0
    rows += [{"step": step, "validation": 2.0} for step in (0, 20, 40)]
    draw_curve(rows, 40, tmp_path / CURVE)
    assert orange_pixels(tmp_path / CURVE) > 500


def orange_pixels(path) -> int:
    return int((np.asarray(Image.open(path)) == (217, 115, 26)).all(-1).sum())


def test_files_on_the_way_the_last_of_them_and_the_raw_weights(world, tmp_path):
    output = {"save_every": 2, "keep_last": 2, "raw": True, "checkpoint_every": 2}
    settings = settings_of(world, "lora", tmp_path / "run", output=output)
    (tmp_path / "run" / "saved").mkdir(parents=True)
    (tmp_path / "run" / "saved" / "out-mine.safetensors").write_bytes(b"mine")
    train(settings)
    names = sorted(path.name for path in (tmp_path / "run" / "saved").iterdir())
    assert names == ["out-00000004.safetensors", "out-00000004_raw.safetensors", "out-00000006.safetensors",
                     "out-00000006_raw.safetensors", "out-mine.safetensors"]  # fmt: skip
    tensors, _ = read_safetensors(tmp_path / "run" / "out.safetensors")
    raw, metadata = read_safetensors(tmp_path / "run" / "out_raw.safetensors")
    assert raw.keys() == tensors.keys()
    assert not same(raw, tensors)
    assert metadata["trained_steps"] == "8"

    plain = settings_of(world, "lora", tmp_path / "plain", train={"ema": 0.0})
    train(plain)
    assert same(read_safetensors(tmp_path / "plain" / "out.safetensors")[0], raw)
    told: list[str] = []
    train(settings, told.append)
    assert told[0].startswith("The run is finished")
    (tmp_path / "run" / "out_raw.safetensors").unlink()
    train(settings)  # writes what is missing
    assert same(read_safetensors(tmp_path / "run" / "out_raw.safetensors")[0], raw)


def test_epochs_stand_where_steps_do(world, tmp_path):
    settings = settings_of(
        world,
        "lora",
        tmp_path / "run",
        output={"save_every": "1 epoch", "checkpoint_every": "0.5 epochs"},
        validation={"share": 0.2, "every": "2 epochs"},
    )
    told: list[str] = []
    train(settings, told.append)
    (epoch,) = [float(found[1]) for text in told if (found := re.search(r"epoch is ([\d.]+) step", text))]
    step = min((tmp_path / "run" / "saved").iterdir()).stem[-8:]
    assert int(step) == epoch == 3
    assert list(validated(tmp_path / "run")) == [0, 6]
    assert in_steps("0.1 epochs", 3) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("07:30", datetime(2026, 11, 30, 7, 30)),
        ("6:15", datetime(2026, 12, 1, 6, 15)),
        ("2026-12-24 18:00", datetime(2026, 12, 24, 18, 0)),
    ],
)
def test_a_run_stops_at_the_next_time_of_that_name(text, expected):
    now = datetime(2026, 11, 30, 7, 0)
    assert stop_time(TrainSettings(stop_at=text), now) == expected
    assert stop_time(TrainSettings(stop_at=text, stop_after=0.25), now) == now + timedelta(minutes=15)
    with pytest.raises(CascadeError, match="which is past"):
        stop_time(TrainSettings(stop_at="2020-01-01 00:00"), now)
    assert not stopping(lambda: False, datetime.now() + timedelta(hours=1))()
    assert stopping(lambda: False, datetime.now() - timedelta(seconds=1))()


def test_a_run_that_stops_at_its_time_goes_on(world, tmp_path):
    settings = settings_of(world, "lora", tmp_path / "run", train={"stop_after": 1e-9})
    told: list[str] = []
    assert not train(settings, told.append).finished
    assert re.fullmatch(r"Stopped at [-\d: ]+, as train.stop_at or stop_after says; the same.*", told[-1])
    free = replace(settings, train=replace(settings.train, stop_after=None))
    assert train(free).finished  # with its latents, and with no word of other settings
    whole = settings_of(world, "lora", tmp_path / "whole")
    train(whole)
    files = [read_safetensors(tmp_path / run / "out.safetensors")[0] for run in ("run", "whole")]
    assert same(*files)


class Recorder:
    """Stands for accelerate's tracker of a program that is not installed here: holds what it is told."""

    def __init__(self, run_name: str, **options: Any):
        self.options, self.rows, self.pictures, self.config, self.finished = options, [], [], {}, False

    def store_init_configuration(self, values):
        assert all(isinstance(value, int | float | str | bool) for value in values.values())
        self.config = values

    def log(self, values, step):
        assert all(isinstance(value, float) for value in values.values())
        self.rows.append((step, values))

    def log_images(self, values, step, dataformats=None):
        assert dataformats in (None, "NHWC")
        self.pictures.append((step, values["samples"].shape))

    def finish(self):
        self.finished = True


def test_trackers_are_told_what_the_log_holds(world, tmp_path, monkeypatch):
    made: list[Recorder] = []

    def build_tracker(*names, **options):
        made.append(Recorder(*names, **options))
        return made[-1]

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker", build_tracker)
    monkeypatch.setattr("accelerate.tracking.WandBTracker", build_tracker)
    monkeypatch.setattr(trackers, "check_trackers", lambda names: None)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    output = {
        "log_with": ["tensorboard", "wandb"],
        "sample_every": 8,
        "prompts": ["a star"],
        "sample_steps": 1,
    }
    settings = settings_of(world, "lora", tmp_path / "run", output=output, validation=HELD_OUT)
    loop_of(settings).run()
    rows = [json.loads(line) for line in (tmp_path / "run" / LOG).read_text().splitlines()]
    logged = [
        (row.pop("step"), {name: value for name, value in row.items() if name != "seconds"}) for row in rows
    ]
    tensorboard, wandb = made
    assert tensorboard.rows == wandb.rows == logged
    assert [step for step, _ in wandb.pictures] == [0, 8]
    assert wandb.options["mode"] == "offline"
    assert wandb.config["train.learning_rate"] == 3e-3
    assert all(each.finished for each in made)


def test_a_tracker_that_is_missing_is_named_before_the_work(world, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    settings = settings_of(world, "lora", tmp_path / "run", output={"log_with": ["wandb"]})
    with pytest.raises(CascadeError, match=r"wandb, which is not installed; run: pip install wandb"):
        check_networks(settings, [])


@pytest.mark.parametrize(
    ("cls", "values", "sentence"),
    [
        (ValidationSettings, {"every": 5}, "give either a share of the data's, or a folder or tars"),
        (ValidationSettings, {"every": 5, "share": 0.1, "folder": "x"}, "give either a share"),
        (ValidationSettings, {"share": 0.1}, "every is 0; give the steps"),
        (ValidationSettings, {"share": 0.6, "every": 1}, "validation.share is 0.6"),
        (OutputSettings, {"file": "x", "save_every": "1 eon"}, "or epochs, such as '1 epoch'"),
        (OutputSettings, {"file": "x", "sample_every": "0 epochs"}, "or epochs, such as '1 epoch'"),
        (OutputSettings, {"file": "x", "log_with": ["aim"]}, "log_with"),
        (OutputSettings, {"file": "x", "keep_last": 0}, "output.keep_last is 0"),
        (TrainSettings, {"stop_at": "soon"}, "a time of day such as '07:30' is expected"),
        (TrainSettings, {"stop_at": "25:00"}, "a time of day such as '07:30' is expected"),
        (TrainSettings, {"stop_after": 0}, "train.stop_after is 0"),
    ],
)
def test_settings_that_make_no_sense(cls, values, sentence):
    with pytest.raises(CascadeError, match=sentence):
        build(cls, values)


@pytest.mark.parametrize("name", ["log.jsonl", "samples"])
def test_a_run_that_cannot_write_what_it_shows_ends_with_a_sentence(world, tmp_path, name):
    """As on a full disk, here because something else has come to stand in its place."""
    output = {"sample_every": 4, "prompts": ["a red star"], "sample_steps": 1, "checkpoint_every": 2}
    settings = settings_of(world, "lora", tmp_path / "run", output=output, train={"steps": 4})
    file = tmp_path / "run" / name

    def obstruct(progress):
        if progress.step != 2:
            return
        if file.is_dir():
            shutil.rmtree(file)
            file.touch()
        else:
            file.unlink(missing_ok=True)
            file.mkdir()

    told = rf"could not use \S*{re.escape(name)}\S* \(.*the same command goes on"
    with pytest.raises(CascadeError, match=told) as raised:
        train(settings, report=obstruct)
    assert "\n" not in str(raised.value)
    file.rmdir() if file.is_dir() else file.unlink()
    assert train(settings).finished


def test_what_has_no_average_has_no_raw_weights(world, tmp_path):
    with pytest.raises(CascadeError, match=r"train\.ema makes none here"):
        settings_of(world, "lora", tmp_path / "run", train={"ema": 0.0}, output={"raw": True})
    with pytest.raises(CascadeError, match="validation measures the error in the noise"):
        settings_of(world, "lora for few steps", tmp_path / "run", validation=HELD_OUT)
