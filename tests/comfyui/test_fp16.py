"""Stage C in fp16 inside ComfyUI, on a card that has no bf16."""

import pytest


@pytest.mark.parametrize("name", ["fp16", "fp16 with a LoRA", "after the LoRA"])
def test_does_not_overflow(measured, name):
    assert measured[name] <= 2e-2


def test_the_engine_computes_it(measured):
    assert measured["forwards without the engine"] == 0


def test_the_lora_counts(measured):
    assert measured["the LoRA's own effect"] > 0.05


def test_what_is_saved_is_what_was_loaded(measured):
    assert measured["weights as in the file"]


def test_what_it_is_kept_and_computed_in(measured):
    """None: in the precision of the weights."""
    assert measured["precisions"] == {
        "auto": "float16, None",
        "bf16": "bfloat16, float16",
        "fp8": "float16, None",  # beside weights in 8 bits
        "int8": "float16, None",
        "fp16": "float16, None",
        "fp32": "float32, None",
    }
