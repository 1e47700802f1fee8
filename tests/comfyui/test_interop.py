"""Our nodes and ComfyUI's own work together in every combination, and give the same."""

import pytest


def chosen(measured, words):
    matches = {name: value for name, value in measured.items() if words in name}
    assert matches
    return matches


def test_our_samplers_on_our_model_and_on_the_native_one(measured):
    differences = chosen(measured, "on either")
    assert len(differences) == 8
    assert {name: value for name, value in differences.items() if not value <= 1e-4} == {}


@pytest.mark.parametrize("words", ["KSampler", "SamplerCustomAdvanced"])
def test_our_ddim_and_the_native_one(measured, words):
    assert {name: value for name, value in chosen(measured, words).items() if not value <= 1e-3} == {}


def test_every_combination_of_loaders_text_samplers_and_decoders(measured):
    differences = chosen(measured, "matrix")
    assert len(differences) == 4
    assert {name: value for name, value in differences.items() if not value <= 1e-3} == {}


def test_our_samplers_on_native_latents(measured):
    differences = chosen(measured, "on the native latent")
    assert len(differences) == 2
    assert set(differences.values()) == {0.0}
