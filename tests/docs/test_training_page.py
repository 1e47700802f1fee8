"""docs/tasks/training.md: its settings files are read as they stand, and no setting is missing on it."""

import dataclasses
import re
from pathlib import Path

import pytest

from cascade_nodes.cascade_core.training import settings
from cascade_nodes.cascade_core.training.settings import DataSettings
from cascade_nodes.cascade_core.training.typed_yaml import parse_yaml

PAGE = (Path(__file__).parents[2] / "docs" / "tasks" / "training.md").read_text(encoding="utf-8")
FILES = re.findall(r"```yaml\n# cascade train (\w+) \S+\n(.*?)```", PAGE, re.DOTALL)
SECTIONS = [
    settings.ModelSettings,
    DataSettings,
    settings.TrainSettings,
    settings.ObjectiveSettings,
    settings.LoRASettings,
    settings.ControlNetSettings,
    settings.FinetuneSettings,
    settings.TokenSettings,
    settings.OutputSettings,
]


@pytest.mark.parametrize(("task", "text"), FILES)
def test_a_settings_file_is_read(task, text):
    read = settings.settings_of(parse_yaml(text, "the page"), task, "the page")
    assert read.output.file.endswith(".safetensors")


def test_there_is_a_settings_file_for_each_task():
    assert {task for task, _ in FILES} == {"lora", "controlnet", "finetune", "tokens"}


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_setting_is_explained(section):
    missing = [field.name for field in dataclasses.fields(section) if f"`{field.name}`" not in PAGE]
    assert missing == []
