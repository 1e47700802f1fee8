"""Our nodes and ComfyUI's own work together in every combination, and give the same."""

import pytest


def chosen(measured, words):
    found = {name: value for name, value in measured.items() if words in name}
    assert found
    return found


def test_our_samplers_on_our_model_and_on_the_native_one(measured):
    found = chosen(measured, "on either")
    assert len(found) == 8
    assert {name: value for name, value in found.items() if not value <= 1e-4} == {}


@pytest.mark.parametrize("words", ["KSampler", "SamplerCustomAdvanced"])
def test_our_ddim_and_the_native_one(measured, words):
    assert {name: value for name, value in chosen(measured, words).items() if not value <= 1e-3} == {}


def test_every_combination_of_loaders_text_samplers_and_decoders(measured):
    found = chosen(measured, "matrix")
    assert len(found) == 4
    assert {name: value for name, value in found.items() if not value <= 1e-3} == {}


def test_our_samplers_on_native_latents(measured):
    found = chosen(measured, "on the native latent")
    assert len(found) == 2
    assert set(found.values()) == {0.0}
