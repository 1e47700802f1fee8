"""What ComfyUI's own LoRA nodes read of the files that we write, to the number."""

import pytest


@pytest.mark.parametrize("dialect", ["kohya", "onetrainer", "comfyui"])
def test_whole(measured, dialect):
    assert (measured[dialect]["stage_c"], measured[dialect]["text"]) == (1.0, 1.0)
    assert measured[dialect]["error"] <= 1e-5


@pytest.mark.parametrize("dialect", ["kohya_to_out", "onetrainer_first", "omi", "diffusers", "onetrainer_kohya",
                                     "onetrainer_original", "onetrainer_comfy", "peft"])  # fmt: skip
def test_others_in_part_or_not_at_all(measured, dialect):
    """So converting them is worthwhile; if a version of ComfyUI begins to read one, the docs should say so."""
    assert measured[dialect]["stage_c"] < 1.0
    assert measured[dialect]["error"] <= 1e-5
