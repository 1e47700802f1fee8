"""Training nodes on the tiny cascade: the file that comes is the one that their loaders list."""

import os
import unicodedata

import pytest
import torch
from PIL import Image

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.adapters import read_adapter
from cascade_nodes.cascade_core.checkpoints import read_safetensors
from cascade_nodes.cascade_core.errors import Interrupted
from cascade_nodes.nodes.hosts.reporting import reporting_to
from cascade_nodes.nodes.loaders import CascadeControlNetLoader, StageBLoader, StageCLoader
from cascade_nodes.nodes.lora import CascadeLoRAApply
from cascade_nodes.nodes.training import (
    CascadeTrainControlNet,
    CascadeTrainLoRA,
    CascadeTrainTokens,
    LiveView,
    file_name,
    node_settings,
)
from cascade_nodes.tests.core.training_runs import write_world

GIVEN = {
    "name": "style",
    "pictures": "pictures",
    "stage_c": "tiny_stage_c.safetensors",
    "text_encoder": "tiny_text_encoder",
    "compressor": "tiny_compressor.safetensors",
    "size": 64,
    "steps": 5,
    "batch_size": 2,
    "learning_rate": 1e-3,
    "seed": 3,
    "settings": "train: {precision: fp32}\noutput: {log_every: 1}",
}


@pytest.fixture(scope="module")
def trained_world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(trained_world, tmp_path, monkeypatch):
    """The tiny cascade is found; new files go to a folder of the test's own, which is the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "pictures").symlink_to(trained_world / "pictures")
    monkeypatch.setenv(
        "CASCADE_MODELS", os.pathsep.join([str(tmp_path / "models"), str(trained_world / "models")])
    )
    return tmp_path


class Watcher:
    """A node's sink that stops the run at a step."""

    def __init__(self, last=None):
        self.last, self.steps, self.told = last, [], []

    def step(self, step, total, preview):
        self.steps.append((step, total))

    def notify(self, text):
        self.told.append(text)

    def interrupted(self):
        return self.last is not None and (self.last, 5) in self.steps


@torch.inference_mode()  # as ComfyUI executes nodes
def execute(node, watcher, **changes):
    with reporting_to(watcher):
        return node.execute(**{**GIVEN, **changes})[0]


def test_a_lora_is_trained_and_found_by_its_node(world):
    watcher = Watcher()
    name = execute(CascadeTrainLoRA, watcher, rank=4)
    assert name == "style.safetensors"
    assert [step for step in watcher.steps if step[1] == 5] == [(i, 5) for i in range(1, 6)]
    assert watcher.told[0].startswith("10 pictures with ")
    assert watcher.told[-1].startswith("Wrote ")
    adapter = read_adapter(world / "models" / "loras" / name)
    assert {change.rank for change in adapter.stage_c.values()} == {4}
    model = StageCLoader.execute("tiny_stage_c.safetensors", "auto")[0]
    CascadeLoRAApply.execute(model, name, 1.0, 0.0)
    (run,) = (world / "output" / "training").glob("lora_style_*")
    assert (run / "log.jsonl").is_file()
    assert not (run / "state.safetensors").exists()  # a finished run goes on no more


def test_a_lora_of_stage_b_is_trained_by_settings_and_applied_to_stage_b(world):
    chosen = "lora: {network: stage_b}\nmodels: {stage_b: tiny_stage_b.safetensors, stage_a: tiny_stage_a.safetensors}"
    name = execute(CascadeTrainLoRA, Watcher(), rank=4, settings=f"{GIVEN['settings']}\n{chosen}")
    assert not read_adapter(world / "models" / "loras" / name).stage_c
    model = StageBLoader.execute("tiny_stage_b.safetensors", "auto")[0]
    CascadeLoRAApply.execute(model, name, 1.0, 0.0)


def test_a_preset_counts_before_the_inputs_and_after_the_settings(world):
    inputs = {**GIVEN, "settings": "train: {precision: fp32, accumulate: 3}", "preset": "8gb"}
    settings = node_settings("lora", inputs, {"lora": {"rank": 4}})
    train = settings.train
    assert (train.batch_size, train.accumulate, train.base_weights, settings.data.size) == (1, 3, "int8", 768)
    assert node_settings("lora", {**inputs, "preset": "none"}, {}).train.base_weights == "full"


def test_a_run_shows_its_curve_above_its_samples(tmp_path):
    shown = []
    view = LiveView(lambda step, steps, picture=None: shown.append((step, steps, picture)), 7)
    view.show(tmp_path / "loss.png")  # which is not there yet
    (tmp_path / "samples").mkdir()
    for name, colour, size in (("samples/000000.png", "red", (4, 3)), ("loss.png", "blue", (10, 5))):
        Image.new("RGB", size, colour).save(tmp_path / name)
        view.show(tmp_path / name)
    assert [(step, steps) for step, steps, _ in shown] == [(0, 7), (0, 7)]
    samples, both = (picture for *_, picture in shown)
    assert samples.size == (4, 3)
    assert both.size == (10, 8)
    assert both.getpixel((5, 0)) == (0, 0, 255)
    assert both.getpixel((5, 7)) == (255, 0, 0)


def test_an_interrupted_run_goes_on(world):
    execute(CascadeTrainLoRA, Watcher(), rank=4, name="whole")
    with pytest.raises(Interrupted):
        execute(CascadeTrainLoRA, Watcher(last=3), rank=4)
    assert not (world / "models" / "loras" / "style.safetensors").exists()
    watcher = Watcher()
    execute(CascadeTrainLoRA, watcher, rank=4)
    assert [step for step in watcher.steps if step[1] == 5] == [(4, 5), (5, 5)]
    uninterrupted, resumed = (
        read_safetensors(world / "models" / "loras" / f"{name}.safetensors")[0] for name in ("whole", "style")
    )
    assert all(torch.equal(uninterrupted[key], resumed[key]) for key in uninterrupted)

    watcher = Watcher()  # other settings begin anew, and their file takes nobody's place
    assert execute(CascadeTrainLoRA, watcher, rank=2) == "style_00001.safetensors"
    assert [step for step in watcher.steps if step[1] == 5] == [(i, 5) for i in range(1, 6)]


def states(world):
    return sorted((world / "output" / "training").glob("*/state.safetensors"))


def test_no_run_touches_another(world):
    """It touches neither a run of a similar name, nor one of the same name with other settings or pictures."""
    with pytest.raises(Interrupted):
        execute(CascadeTrainLoRA, Watcher(last=3), rank=2, name="sub/a")
    (state,) = states(world)
    (world / "input" / "others").mkdir()
    for file in (world / "input" / "pictures").iterdir():
        (world / "input" / "others" / file.name).symlink_to(file.resolve())
    for changes in ({"name": "sub_a"}, {"name": "a"}, {"name": "sub/A"}, {"seed": 4}, {"pictures": "others"}):
        with pytest.raises(Interrupted):
            execute(CascadeTrainLoRA, Watcher(last=3), rank=2, **{"name": "sub/a", **changes})
    assert len(states(world)) == 6
    watcher = Watcher()
    assert execute(CascadeTrainLoRA, watcher, rank=2, name="./sub/a .safetensors") == "sub/a.safetensors"
    assert [step for step in watcher.steps if step[1] == 5] == [(4, 5), (5, 5)]
    assert len(states(world)) == 5
    assert state not in states(world)


def test_a_controlnet_is_trained_and_loaded(world):
    name = execute(CascadeTrainControlNet, Watcher(), hint="inpainting", name="inpaint.safetensors")
    assert name == "inpaint.safetensors"
    CascadeControlNetLoader.execute(name)


def test_a_token_is_trained(world):
    name = execute(CascadeTrainTokens, Watcher(), token="[blob]", initial="star", vectors=2)
    (token,) = read_adapter(world / "models" / "loras" / name).tokens
    assert (token.name, token.vectors.shape) == ("[blob]", (2, 64))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"name": "../style"}, "name is '../style', which leads out of the folder"),
        ({"name": ""}, "name is '', which names no file"),
        ({"pictures": "x" * 5000}, "does not exist; give a folder of pictures"),
        ({"pictures": "a\0b"}, "'a\\x00b' does not exist; give a folder of pictures"),
        ({"pictures": "none"}, "'none' does not exist; give a folder of pictures"),
        ({"settings": "output: {file: /tmp/x}"}, "output.file is decided by the node's other inputs"),
        ({"settings": "train: {stpes: 3}"}, "settings: train: 'stpes' is not a setting; did you mean steps?"),
        ({"settings": "[1"}, "settings is not YAML"),
        ({"settings": "lora: " + "[" * 3000}, "settings, line 1: settings are not nested so deeply."),
        ({"settings": "lora: {alpha: 0}"}, "settings: lora.alpha is 0.0; it must be at least 1e-06"),
        ({"settings": "lora: {dialect: kohia}"}, "There is no LoRA dialect 'kohia'; choose one of"),
        (
            {"settings": "output: {sample_every: 5}"},
            "settings: output.sample_every makes pictures of output.prompts",
        ),
        ({"stage_c": "none.safetensors"}, "No Stage C file 'none.safetensors' was found"),
    ],
)
def test_what_is_wrong_is_named(world, changes, sentence):
    with pytest.raises(CascadeError) as error:
        execute(CascadeTrainLoRA, Watcher(), rank=4, **changes)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    "spelling",
    ["が/a", "が/a ", "./が/a", "が\\a", "が//a", "が/a.SAFETENSORS", unicodedata.normalize("NFD", "が/a")],
)
def test_spellings_of_a_name_are_one(spelling):
    assert file_name(spelling) == "が/a.safetensors"


@pytest.mark.parametrize(
    "name",
    [
        "", " ", ".", "..", "../a", "a/../b", "/a", "\\a", "a/", "a/.", ".a", "a.", "sub/.a", "..\\a", "a\0b", "a\nb",
        "a\x1b[31m",
        "a\ud800", "a\u202eb", "nul", "CON.txt", "sub/com1", "a" * 201, "あ" * 70, "a" * 10_000_000, ".safetensors",
    ],
)  # fmt: skip
def test_what_names_no_new_file_is_refused_in_a_short_sentence(name):
    with pytest.raises(CascadeError) as error:
        file_name(name)
    assert len(str(error.value)) < 300
    assert str(error.value).isprintable()


def test_files_are_checked_before_the_graph_runs(world):
    assert CascadeTrainLoRA.validate_inputs(stage_c="tiny_stage_c.safetensors") is True
    assert "No text encoder file 'x'" in str(CascadeTrainTokens.validate_inputs(text_encoder="x"))


def test_a_new_caption_is_a_new_run(world, trained_world):
    folder = world / "input" / "others"
    folder.mkdir()
    (folder / "a.txt").write_text("a star")
    before = CascadeTrainLoRA.fingerprint_inputs(pictures="others")
    assert before == CascadeTrainLoRA.fingerprint_inputs(pictures="others")
    (folder / "a.txt").write_text("a red star")
    assert before != CascadeTrainLoRA.fingerprint_inputs(pictures="others")
