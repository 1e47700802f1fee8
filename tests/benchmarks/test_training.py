"""benchmarks/training.py: what is measured of a preset is what `cascade train` makes of it."""

from argparse import Namespace
from itertools import product

import pytest

from cascade_nodes.cascade_core.training.presets import NAMES, PRESETS
from cascade_nodes.cascade_core.training.settings import Settings
from cascade_nodes.cascade_core.training.settings import settings_of as read_values

OPTIONS = Namespace(
    size="3.6b", warm=5, steps=10, precision="auto", compile=False, cuda_graphs=True, deterministic=True, fsdp=False,
    rank=16, batch=7, accumulate=3, optimizer="adamw", recompute=True, profile=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("task", "preset"),
    list(product(["lora", "controlnet", "finetune"], NAMES)),
)
def test_a_preset_is_measured_with_all_of_its_settings(module, tmp_path, task, preset):
    measured: Settings = module("training").settings_of(OPTIONS, task, "full", preset, str(tmp_path))
    values = {"data": {"folder": "."}, "output": {"file": "x.safetensors"}, "preset": preset}
    trained = read_values(values, task, "x.yaml")
    for section, keys in PRESETS[task].get(preset, {}).items():
        for key in keys:
            assert getattr(getattr(measured, section), key) == getattr(getattr(trained, section), key)
    assert measured.train.batch_size * measured.train.accumulate == 4


def test_what_has_no_preset_is_measured_as_the_options_say(module, tmp_path):
    measured: Settings = module("training").settings_of(OPTIONS, "stage_b", "int8", None, str(tmp_path))
    assert measured.network == "stage_b"
    assert (measured.train.batch_size, measured.train.base_weights) == (7, "int8")
