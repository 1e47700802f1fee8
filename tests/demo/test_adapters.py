"""The demo's adapters: their data, their loss against the core's, a run from begin to end, and who trains where."""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cascade_nodes.cascade_core.adapters import read_adapter
from cascade_nodes.cascade_core.checkpoints.files import read_header, read_safetensors
from cascade_nodes.cascade_core.diffusion.loss_weights import debiased
from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.cascade_core.hints.masks import latent_mask
from cascade_nodes.cascade_core.text.encoder import TextEncoder
from cascade_nodes.cascade_core.training.losses import PathLevel, consistency_loss, consistency_terms
from cascade_nodes.cascade_core.training.settings import ObjectiveSettings
from cascade_nodes.demo import adapter_data, adapters, everything, figures
from cascade_nodes.demo.adapter_data import AdapterData, houses, loops, ordinary
from cascade_nodes.demo.evaluate import MEASUREMENTS
from cascade_nodes.demo.few_steps import Jumps
from cascade_nodes.demo.job import FINISHED, Job
from cascade_nodes.demo.pipeline import WEIGHTS
from cascade_nodes.demo.tasks import TASKS as MEASURED_TASKS
from cascade_nodes.demo.train_adapter import TASKS, Base, main, recipe_of

CPU = torch.device("cpu")


def a_job(name: str, folder: Path, scenes: int = 16) -> Job:
    settings = replace(recipe_of(name, CPU).train, batch_size=4, steps=2)
    return Job(settings, folder / "work" / name, WEIGHTS, folder, CPU, scenes)


@pytest.mark.parametrize("student_steps", [4, None])
def test_the_distillation_is_the_cores(student_steps):
    objective = ObjectiveSettings(
        kind="consistency", solver_steps=20, sampling_steps=student_steps, max_loss_weight=100,
        pure_noise_share=0.25, shift=1.5,
    )  # fmt: skip
    x0 = torch.randn(16, 3, 2, 2)

    def predict(x, r):
        return (x + r.view(-1, 1, 1, 1)).sin()

    def teacher(x, r):
        return (2 * x - r.view(-1, 1, 1, 1)).cos()

    torch.manual_seed(1)
    expected = consistency_loss(predict, teacher, x0, 20, 100, 0.25, debiased, 1.5, student_steps)
    torch.manual_seed(1)
    x, levels, weight, clean = Jumps(objective, CPU).draw(x0)
    found = consistency_terms(predict, teacher, x, [PathLevel(*level) for level in levels], weight, clean)
    for name, value in expected.items():
        assert found[name].equal(value), name


def test_beside_a_mask_an_inpainting_controlnet_sees_what_was_there(tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_data, "AT_ONCE", 4)  # so that some are without replaced objects
    job = a_job("inpainting", tmp_path)
    base = Base(job, TextEncoder.load(job.weights / "demo_text_encoder", dtype=torch.float32))
    data = AdapterData(job, recipe_of("inpainting", CPU), base.encoder, ordinary(job, base.encoder.tokenizer))
    data.load()
    tokens, latents, hints, places = data._inpainted(0, 16)
    assert tokens.shape == (16, 4, 77)
    assert hints.shape == (16, 4, 192, 192)
    assert (hints[:, :3].float() >= hints[:, 3:].float()).all()  # white where the mask is
    own = data._plain(0, 16)[1]
    masks = hints[:, 3].float() / 255
    least, most = (latent_mask(masks, 16, (6, 6), grow) for grow in (0, 1))
    changed = (latents - own).abs().amax(1, keepdim=True) > 1e-3
    assert not (changed & (least > 0)).any()  # the picture itself within
    assert (changed & (most == 0)).flatten(1).any(1)[:8].float().mean() > 0.3  # another one's beside
    assert (places[least > 0] >= places.amin()).all()
    assert torch.allclose(places.mean(dim=(1, 2, 3)), torch.ones(16), atol=1e-4)


def test_houses_and_loops_have_their_words(tmp_path):
    job = a_job("house", tmp_path, 24)
    base = Base(job, TextEncoder.load(job.weights / "demo_text_encoder", dtype=torch.float32))
    tokenizer = base.encoder.tokenizer
    found = houses(job, tokenizer)
    with_house = [any("house" in _text(tokenizer, row) for row in rows) for rows in found.tokens]
    assert sum(with_house) == 18  # of four, one is ordinary
    names = {"[loop]": range(900, 902)}
    rows = loops(a_job("loop", tmp_path, 8), tokenizer, names).tokens
    assert ((rows == 900).sum(-1) == 1).all()
    assert ((rows == 901).sum(-1) == 1).all()


def _text(tokenizer, row) -> str:
    return tokenizer.backend.decode([int(token) for token in row if token < len(tokenizer)]).replace(" ", "")


def test_an_adapter_is_trained_from_begin_to_end_and_goes_on(tmp_path, capsys):
    def run(steps):
        options = ["--scenes", "16", "--batch-size", "2", "--steps", steps, "--device", "cpu"]
        main(["house", "--work", str(tmp_path / "work"), "--out", str(tmp_path), *options])

    run("1")
    run("2")
    assert "goes on from step 1" in capsys.readouterr().out
    path = tmp_path / "demo_lora_house.safetensors"
    metadata = read_header(path).metadata
    assert metadata["modelspec.trigger_phrase"] == "house"
    assert metadata["trained_steps"] == "2"
    assert read_adapter(path, a_job("house", tmp_path).load("stage_c")).stage_c


@pytest.mark.parametrize("name", ["canny", "house", "loop"])
def test_an_adapter_begins_with_the_file_of_a_folder(tmp_path, name):
    options = ["--scenes", "16", "--batch-size", "2", "--steps", "1", "--learning-rate", "1e-12"]
    folders = ["--work", str(tmp_path / "work"), "--out", str(tmp_path), "--from", str(WEIGHTS)]
    main([name, *folders, *options, "--device", "cpu"])
    file = Path(recipe_of(name, CPU).output.file).name
    found, given = (read_safetensors(folder / file)[0] for folder in (tmp_path, WEIGHTS))
    assert found.keys() == given.keys()
    for key, value in given.items():
        if "running_" in key or not value.is_floating_point():
            continue  # a batch norm's statistics follow each batch
        assert torch.allclose(found[key].float(), value.float(), rtol=2e-3, atol=1e-6), key


@pytest.mark.nightly
@pytest.mark.parametrize("name", TASKS)
def test_each_adapter_is_trained_from_begin_to_end(tmp_path, name):
    options = ["--scenes", "32", "--batch-size", "2", "--steps", "2", "--device", "cpu"]
    main([name, "--work", str(tmp_path / "work"), "--out", str(tmp_path), *options])
    assert Path(recipe_of(name, CPU).output.file).name in {path.name for path in tmp_path.iterdir()}


def test_adapters_are_spread_over_the_gpus(tmp_path):
    options = argparse.Namespace(
        seconds=100, work=tmp_path, weights=tmp_path, out=None, only=list(TASKS), options=["--scenes", "9"]
    )
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / FINISHED).write_text("{}")
    lanes = adapters.trainings(options, ["3", "5"])
    gpus = {each.network: each.environment["CUDA_VISIBLE_DEVICES"] for lane in lanes for each in lane}
    assert gpus == {
        "canny": "3", "super_resolution": "3", "loop": "3", "inpainting": "5", "few_steps": "5",
    }  # fmt: skip
    for lane in lanes:
        until = [float(each.options[each.options.index("--until") + 1]) for each in lane]
        assert until == sorted(until)
        assert all(each.options[-2:] == ["--scenes", "9"] for each in lane)
        assert until[-1] == pytest.approx(time.time() + 100, abs=60)


class Noted(everything.Training):
    """A training that runs for two looks at it, and says when."""

    def begin(self, log: list[str]) -> None:
        self.said, self.looks = log, 2

    def start(self) -> None:
        self.said.append(f"{self.network} begins")

    def running(self) -> bool:
        self.looks -= 1
        if self.looks == 0:
            self.said.append(f"{self.network} ends")
        return self.looks > 0

    def last_words(self) -> str:
        return ""


def test_lanes_run_side_by_side_and_each_in_its_order(tmp_path, monkeypatch):
    monkeypatch.setattr(everything.time, "sleep", lambda seconds: None)
    said: list[str] = []
    lanes = [[Noted(name, [], {}, tmp_path, 0.0) for name in names] for names in ("ab", "c")]
    for training in (*lanes[0], *lanes[1]):
        training.begin(said)
    everything.train_together(lanes)
    assert said == ["a begins", "c begins", "a ends", "b begins", "c ends", "b ends"]
    assert [len(lane) for lane in lanes] == [2, 1]


def test_the_whole_recipe_ends_with_the_figures_that_it_measures(tmp_path, monkeypatch, capsys):
    def measure(options, gpus, only, seconds):
        assert (options.weights, options.work, options.count, gpus) == (tmp_path, tmp_path, 7, ["0", "1"])
        assert 20 <= seconds <= 90
        names = {each.name for each in figures.measurements(options, only)}
        assert names == {"adherence", "renderer"}
        raise CascadeError("renderer could not be measured in time.")

    monkeypatch.setattr(figures, "measure", measure)
    for name in everything.IN_TURN:
        (tmp_path / name).mkdir()
        (tmp_path / name / FINISHED).write_text("{}")
    folders = ["--work", str(tmp_path), "--weights", str(tmp_path)]
    everything.main([*folders, "--gpus", "0,1", "--seconds", "90", "--measuring", "20", "--count", "7"])
    told = capsys.readouterr().out
    assert "renderer could not be measured" in told
    assert f"figures are in {tmp_path}" in told


def test_everything_is_measured_once(tmp_path):
    options = argparse.Namespace(work=tmp_path, weights=WEIGHTS, count=500)
    planned = list(figures.measurements(options))
    evaluated = [name for group in figures.SETS for name in group]
    tasks = [name for group in figures.TASK_SETS for name in group]
    assert sorted(evaluated) == sorted(MEASUREMENTS)
    assert sorted(tasks) == sorted(MEASURED_TASKS)
    assert (
        len({each.name for each in planned})
        == len(planned)
        == len(figures.SETS) + len(figures.TASK_SETS) + len(figures.LARGER)
    )
    (one,) = figures.measurements(options, ["judges"])
    assert one.command[-2:] == ["--only", "judges"]


def test_parts_of_the_figures_come_together(tmp_path):
    options = argparse.Namespace(work=tmp_path, weights=WEIGHTS, count=500)
    planned = list(figures.measurements(options, ["lora", "inpaint"]))
    (tmp_path / "parts").mkdir()
    (tmp_path / "tasks.json").write_text('{"inpaint": {"right": 0}, "token": {}}')
    (tmp_path / "parts" / "inpaint.json").write_text('{"count": 200, "inpaint": {"right": 1}}')
    figures._bring_together(planned, tmp_path)
    found = figures.json.loads((tmp_path / "tasks.json").read_text())
    assert found == {"inpaint": {"right": 1}, "token": {}, "count": 200}
