"""ComfyUI handles the values of our loaders as it does its own."""

import pytest


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("LoRA against merged weights", 1e-5),
        ("after the LoRA", 0.0),
        ("CLIP LoRA against merged", 1e-5),
        ("a clone", 0.0),
        ("the model's own sigmas", 0.0),
        ("the model's own logarithms of sigmas", 0.0),
        ("the model's own schedule, after another", 0.0),
        ("the other schedule, after the model's own", 0.0),
        ("partly loaded", 0.0),
        ("the engine", 1e-5),
        ("fp16 weights", 0.0),  # the demo's own precision
        ("bf16 weights", 0.02),
        ("fp8 weights", 0.2),
        ("VAEDecode, native network", 1e-5),
        ("VAEEncode, native network", 1e-5),
        ("VAEDecodeTiled, native network", 1e-5),
        ("VAEDecodeTiled against VAEDecode, mean", 0.005),
        ("VAEDecodeTiled of Stage C, mean", 0.01),
        ("VAEEncode with the compressor", 1e-6),
        ("unCLIPConditioning against CascadeImagePrompt", 1e-6),
        ("an oblong image with and without ComfyUI", 1e-5),
    ],
)
def test_same_as(measured, name, bound):
    assert measured[name] <= bound


@pytest.mark.parametrize(
    "name",
    ["LoRA's own effect", "CLIP LoRA's effect", "the image's own effect", "the other schedule's effect"],
)
def test_has_an_effect(measured, name):
    assert measured[name] > 0.05


def test_can_be_loaded_in_part(measured):
    assert 0 < measured["partly loaded, share"] < 0.9
