"""docs/tasks/training.md: its settings files are read as they stand; the reference explains every setting."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cascade_nodes.cascade_core.training import settings
from cascade_nodes.cascade_core.training.typed_yaml import parse_yaml
from cascade_nodes.headless.catalogue import FILES as PUBLISHED
from cascade_nodes.headless.catalogue import WORKFLOWS
from cascade_nodes.headless.train import finder
from cascade_nodes.tests.core.test_training_features import FEATURES as TRAINED
from cascade_nodes.tests.docs import training_settings

PACK = Path(__file__).parents[2]
PAGE = (PACK / "docs" / "tasks" / "training.md").read_text(encoding="utf-8")
DEMO_COMMANDS, PUBLISHED_COMMANDS = (
    [shlex.split(line) for line in block.splitlines()]
    for block in re.findall(r"```\n(.*?)```", PAGE, re.DOTALL)[:2]
)
FILES = re.findall(r"```yaml\n# cascade train (\w+) \S+\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("task", "text"), FILES)
def test_a_settings_file_is_read(task, text):
    read = settings.settings_of(parse_yaml(text, "the page"), task, "the page")
    assert read.output.file.endswith(".safetensors")


def test_there_is_a_settings_file_for_each_task():
    assert {task for task, _ in FILES} == {"lora", "controlnet", "finetune", "tokens"}


def test_the_reference_is_that_of_the_settings():
    """After a change of settings: python -m cascade_nodes.tests.docs.training_settings"""
    assert training_settings.PAGE.read_text(encoding="utf-8") == training_settings.page()


@pytest.mark.parametrize("section", training_settings.SECTIONS)
def test_every_setting_is_explained(section):
    """A comment beside it or above it explains it, and the reference takes that over."""
    explained = training_settings.comments(training_settings.SECTIONS[section])
    assert [name for name, text in explained.items() if not text] == []
    assert len(explained) == len(dataclasses.fields(training_settings.SECTIONS[section]))


def test_the_three_commands_of_the_demo_belong_together():
    draw, train, run = DEMO_COMMANDS
    recipe = PACK / train[-1]
    read = settings.read_settings(recipe, "lora")
    # Raises for a network that is missing.
    resolved = settings.resolve(read, recipe.parent, finder(recipe.parent))
    assert (draw[2:4], resolved.data.folder) == (["cascade_nodes.demo.taught", "house"], str(PACK / draw[4]))
    assert str(PACK / run[-1]) == f"{resolved.output.folder}/try.json"
    assert all(" ".join(command) in recipe.read_text() for command in DEMO_COMMANDS)


def test_the_three_commands_of_the_published_weights_belong_together():
    fetch, train, run = PUBLISHED_COMMANDS
    first = [PUBLISHED[need[0]].saved_as for need in WORKFLOWS[fetch[-1]].needs]
    models = settings.ModelSettings()
    assert {models.stage_c, models.text_encoder, models.compressor} <= set(first)
    assert all(name in first for name in (settings.DECODERS["stage_b"][0], *settings.DECODERS["stage_a"]))
    assert train[:3] == ["cascade", "train", "lora"]
    assert run[-1] == f"runs/{Path(train[-1]).stem}/try.json"


@pytest.mark.nightly
def test_the_three_commands_of_the_demo_as_they_stand(tmp_path):
    """They run in a folder of their own, which holds the recipe."""
    recipe = tmp_path / DEMO_COMMANDS[1][-1]
    recipe.parent.mkdir(parents=True)
    recipe.write_text((PACK / DEMO_COMMANDS[1][-1]).read_text())
    programs = {"python": [sys.executable], "cascade": [sys.executable, "-m", "cascade_nodes.headless"]}
    for program, *arguments in DEMO_COMMANDS:
        subprocess.run([*programs[program], *arguments], cwd=tmp_path, check=True, env=dict(os.environ))
    (picture,) = (tmp_path / "output").iterdir()
    assert Image.open(picture).size == (256, 256)


FEATURES = re.findall(
    r"`((?:core|nodes|comfyui)/\w+\.py)::(\w+)`",
    (PACK / "docs/tasks/training_features.md").read_text(encoding="utf-8"),
)


def test_each_feature_names_a_test_that_is_there():
    assert len(FEATURES) > 40
    missing = [
        f"{file}::{name}"
        for file, name in FEATURES
        if f"def {name}(" not in (PACK / "tests" / file).read_text(encoding="utf-8")
    ]
    assert missing == []


# Settings of a run, not of what is learned: the test that is named for each makes a run of its own.
OF_RUNS = {
    "captions in text files, jsonl, csv, json", "webdataset tars, read without unpacking",
    "a dry run with a contact sheet",
    "a killed run goes on bit for bit", "files every so many steps or epochs, only the last N kept", "epochs or steps",
    "samples with prompts files", "TensorBoard, wandb", "a loss curve in the folder", "stopping at a given time",
    "fp16 with a loss scale that a resumed run keeps", "curve and samples while it trains, in ComfyUI",
    "several machines without a shared folder, FSDP2", "`modelspec.*` and `ss_*`",
    "captions and folders in the file, only on request", "the same run writes the same bytes",
}  # fmt: skip


def test_each_feature_is_trained_with():
    page = (PACK / "docs/tasks/training_features.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?!\*\*)[^|]+?) \| [^|]+ \| [^|]* \| `", page, re.MULTILINE)
    assert set(rows) == TRAINED.keys() | OF_RUNS
    assert len(rows) == len(TRAINED) + len(OF_RUNS)


def test_each_feature_is_under_a_key_that_exists():
    page = (PACK / "docs/tasks/training_features.md").read_text(encoding="utf-8")
    keys = set(re.findall(r"`((?:data|models|train|objective|output|lora|finetune)\.[a-z_]+)", page))
    known = {
        f"{section}.{field.name}"
        for section, cls in training_settings.SECTIONS.items()
        for field in dataclasses.fields(cls)
    }
    assert keys - known == {"data.sets"} - known
