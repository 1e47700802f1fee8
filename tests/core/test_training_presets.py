"""Presets by memory: what they set, what counts before them, and which one a card has."""

import re
from contextlib import nullcontext
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import pytest
import torch

from cascade_nodes.cascade_core import CascadeError, StageB, StageC
from cascade_nodes.cascade_core.networks.config import PRESETS as CONFIGS
from cascade_nodes.cascade_core.networks.config import StageCConfig
from cascade_nodes.cascade_core.text.clip import TextConfig
from cascade_nodes.cascade_core.text.encoder import build_text_model
from cascade_nodes.cascade_core.training.checks import check_finetune
from cascade_nodes.cascade_core.training.presets import NAMES, PRESETS, preset_for
from cascade_nodes.cascade_core.training.settings import TaskName, settings_from_json, settings_of
from cascade_nodes.cascade_core.training.tasks.finetune import _at_depth

TASKS: list[TaskName] = ["lora", "controlnet", "finetune", "tokens"]
TOKENS = {"tokens": [{"name": "blob"}]}
TEXT = {"finetune": {"network": "text_encoder"}}


def read(task: TaskName, **sections):
    values = {
        "data": {"folder": "."},
        "output": {"file": "x.safetensors"},
        **(TOKENS if task == "tokens" else {}),
    }
    return settings_of({**values, **sections}, task, "x.yaml")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_learns_from_as_many_pictures_by_every_preset(task, name):
    settings = read(task, preset=name)
    assert settings.train.batch_size * settings.train.accumulate == 4
    assert settings.preset == name


@pytest.mark.parametrize(("task", "sections"), [*((task, {}) for task in TASKS), ("finetune", TEXT)])
def test_less_memory_never_takes_more(task, sections):
    def bits(name):
        settings = read(task, preset=name, **sections)
        weights = {"nf4": 4, "int8": 8, "full": 16}[settings.train.base_weights]
        return weights, settings.train.batch_size, settings.data.size, -settings.finetune.depth[0]

    for smaller, larger in pairwise(NAMES):
        assert all(a <= b for a, b in zip(bits(smaller), bits(larger), strict=True)), (smaller, larger)
    assert PRESETS[task]


def test_the_file_counts_before_its_preset():
    settings = read(
        "lora", preset="8gb", train={"batch_size": 2, "steps": 7}, data={"folder": ".", "size": 512}
    )
    assert (settings.train.batch_size, settings.train.steps, settings.data.size) == (2, 7, 512)
    assert (settings.train.base_weights, settings.train.optimizer) == ("int8", "adamw8bit")


def test_modules_of_a_finetune_are_not_cut_by_a_preset():
    settings = read("finetune", preset="24gb", finetune={"modules": ["up_blocks.*"]})
    assert settings.finetune.depth == (0.0, 1.0)
    assert settings.train.optimizer == "adamw8bit"


@pytest.fixture(scope="module")
def published():
    """Networks of the published sizes, without values."""
    kinds = {"stage_c_3.6b": StageC, "stage_c_1b": StageC, "stage_b_1.5b": StageB, "stage_b_700m": StageB}
    with torch.device("meta"):
        networks: dict[str, Any] = {name: kind.from_config(CONFIGS[name][1]) for name, kind in kinds.items()}
    return {**networks, "text": build_text_model(asdict(TextConfig()), "meta")}


@pytest.mark.parametrize(
    ("size", "finetune", "smallest"),
    [
        ("stage_c_3.6b", {}, "12gb"),
        ("stage_c_3.6b", {"modules": ["up_blocks.*"]}, "48gb"),
        ("stage_c_3.6b", {"network": "text_encoder"}, "12gb"),
        ("stage_c_3.6b", {"network": "text_encoder", "modules": ["text_model.encoder.layers.31.*"]}, "8gb"),
        ("stage_c_3.6b", {"text_encoder": True, "depth": [0.93, 1.0]}, "24gb"),
        ("stage_c_1b", {}, "8gb"),
        ("stage_c_1b", {"network": "text_encoder"}, "12gb"),
        ("stage_b_1.5b", {"network": "stage_b"}, "8gb"),
        ("stage_b_700m", {"network": "stage_b", "depth": [0.0, 1.0]}, "12gb"),
    ],
)
def test_a_finetune_is_refused_where_a_preset_cannot_hold_it(
    published, size, finetune, smallest, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    for name in NAMES:
        settings = read("finetune", preset=name, finetune=finetune)
        refused = NAMES.index(name) < NAMES.index(smallest)
        with pytest.raises(CascadeError, match=f"preset {name} leaves ") if refused else nullcontext():
            check_finetune(settings, published[size], published["text"])


def test_the_count_is_that_of_the_table(published, monkeypatch):
    """For each preset, what one H200 reserved (docs/tasks/training.md) and what is counted, in GB."""
    monkeypatch.setattr("cascade_nodes.cascade_core.training.checks.free_bytes", lambda preset: 0.0)
    for name, measured in (("12gb", 10.4), ("16gb", 13.2), ("24gb", 18.7), ("48gb", 44.3)):
        with pytest.raises(CascadeError, match="takes about") as raised:
            check_finetune(read("finetune", preset=name), published["stage_c_3.6b"], published["text"])
        (counted,) = re.findall(r"about ([0-9.]+) GB", str(raised.value))
        assert abs(float(counted) - measured) < 0.05 * measured


def test_a_state_keeps_what_a_preset_set():
    settings = read("lora", preset="12gb")
    assert settings_from_json(settings.as_json()) == settings


@pytest.mark.parametrize(
    ("gib", "name"),
    [(4, "8gb"), (7.6, "8gb"), (11.9, "12gb"), (15.7, "16gb"), (23.6, "24gb"), (47.4, "48gb"), (140, "48gb")],
)
def test_a_card_has_the_preset_of_its_memory(gib, name):
    assert preset_for(int(gib * 2**30)) == name


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("10gb", "x.yaml: preset is '10gb'; known: auto, 8gb, 12gb, 16gb, 24gb, 48gb."),
        ("auto", "there is none; leave it out"),
    ],
)
def test_a_preset_that_cannot_be_had_is_told(name, words, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(CascadeError) as raised:
        read("lora", preset=name)
    assert words in str(raised.value)


def test_the_last_block_of_a_small_network_is_trained_however_late_the_share_begins():
    with torch.device("meta"):
        network = StageC(StageCConfig(c_cond=8, c_hidden=(64, 64), nhead=(1, 1), blocks=((1, 1), (1, 1))))
    blocks = [block for level, _ in network.levels() for block in level]
    assert round(0.99 * len(blocks)) == len(blocks)
    last = {id(parameter) for parameter in blocks[-1].parameters()}
    assert _at_depth(network, [0.99, 1.0]) == {n for n, p in network.named_parameters() if id(p) in last}
