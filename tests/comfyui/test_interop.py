"""Our nodes and ComfyUI's own work together in every combination, and give the same."""

import pytest


@pytest.fixture(scope="module")
def differences(checkout):
    return checkout.inside("interop")


def chosen(differences, words):
    found = {name: value for name, value in differences.items() if words in name}
    assert found
    return found


def test_our_samplers_on_our_model_and_on_the_native_one(differences):
    found = chosen(differences, "on either")
    assert len(found) == 8
    assert {name: value for name, value in found.items() if not value <= 1e-4} == {}


@pytest.mark.parametrize("words", ["KSampler", "SamplerCustomAdvanced"])
def test_our_ddim_and_the_native_one(differences, words):
    assert {name: value for name, value in chosen(differences, words).items() if not value <= 1e-3} == {}


def test_every_combination_of_loaders_text_samplers_and_decoders(differences):
    found = chosen(differences, "matrix")
    assert len(found) == 4
    assert {name: value for name, value in found.items() if not value <= 1e-3} == {}
