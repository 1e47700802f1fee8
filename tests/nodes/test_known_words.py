"""A prompt with words that a text encoder was never taught says so, where the encoder's file states which it was."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from cascade_nodes.cascade_core.adapters import Adapter
from cascade_nodes.cascade_core.checkpoints import read_safetensors, write_safetensors
from cascade_nodes.cascade_core.run import RunObserver
from cascade_nodes.cascade_core.stages.device import ComputeDevice
from cascade_nodes.cascade_core.stages.prompt import load_text_encoder
from cascade_nodes.cascade_core.text.known_words import describe_unknown_words, stated_words, unknown_words
from cascade_nodes.demo.captions import known_words
from cascade_nodes.demo.door import WEIGHTS
from cascade_nodes.nodes.conditioning import CascadeTextEncode
from cascade_nodes.nodes.hosts.headless.clip import load_text_encoder as load_for_node
from cascade_nodes.nodes.hosts.reporting import reporting_to

WORDS = known_words()


@pytest.mark.parametrize(
    ("prompt", "names", "unknown"),
    [
        ("", (), []),
        ("a red star, no circle!!!", (), []),
        ("A Red STAR (small:1.3) on ((sand))", (), []),
        ("a dog and a (Cat:1.2), a dog", (), ["dog", "Cat"]),
        ("a [loop] on grass", ("[loop]",), []),
        ("a [LOOP] on grass", ("[loop]",), []),
        ("a [loop] on grass", (), ["loop"]),
        ("a star, embedding:some_style", (), []),
        ("2 blue-green stars; 赤い星", (), ["2", "赤い星"]),
        ("the red star", (), []),
        ("don't show a star's ring, it’s 'red'", (), ["don't", "star's", "it’s"]),
        ("⭐ on 🏖️ — “red” © ☆ 1.5", (), ["⭐", "🏖", "☆", "1", "5"]),
        ("a star <lora:house:0.8> BREAK a break", (), ["break"]),
    ],
)
def test_words_that_were_never_taught(prompt, names, unknown):
    assert unknown_words(prompt, [*WORDS, "the"], names) == unknown


def test_a_sentence_names_them_and_what_is_known():
    assert describe_unknown_words(["a red star", "no circle"], WORDS) is None
    assert describe_unknown_words(["a lighthouse in a storm"], ()) is None
    sentence = describe_unknown_words(["a red dog", "a dog, a car"], WORDS)
    assert sentence is not None
    assert sentence.startswith("The text encoder was never taught 'dog', 'car', so")
    assert (
        ", so the picture may show anything, unless a LoRA teaches that; the words it knows are circle, "
        in sentence
    )
    assert ", below, no, without and " in sentence
    long = describe_unknown_words([" ".join(f"x{'y' * 500}{n}" for n in range(200))], WORDS * 50)
    assert long is not None
    assert len(long) < 1500
    assert "and 194 more" in long
    acting = describe_unknown_words(["dog"], ("red\x1b[2J",))
    assert acting is not None
    assert "\x1b" not in acting


@pytest.mark.parametrize("text", ["", "{", "{}", "3", '"red"', "[" * 100_000, json.dumps(["a"] * 20_000)])
def test_what_is_not_a_list_of_words_states_none(text):
    assert stated_words({"words": text}) == ()


def test_odd_entries_are_left_out():
    assert stated_words({"words": json.dumps(["Red", 3, "", "x" * 1000, None, "star"])}) == ("red", "star")
    assert stated_words(None) == ()


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """The demo's text encoder with its words in the file, and what it has said."""
    folder = tmp_path_factory.mktemp("models") / "encoder"
    shutil.copytree(WEIGHTS / "demo_text_encoder", folder)
    tensors, metadata = read_safetensors(folder / "model.safetensors")
    write_safetensors(folder / "model.safetensors", tensors, {**metadata, "words": json.dumps(WORDS)})
    told: list[str] = []
    device = ComputeDevice(device=torch.device("cpu"), observer=RunObserver(told.append))
    return SimpleNamespace(text=load_text_encoder(folder, device), told=told, folder=folder)


def test_an_encoder_that_knows_its_words_tells_of_others(stage):
    stage.told.clear()
    stage.text.encode(["a red star", ""])
    assert stage.told == []
    stage.text.encode(["a red dog"])
    (sentence,) = stage.told
    assert "'dog'" in sentence


def test_the_node_of_the_embedded_host_tells_of_either_prompt(stage):
    class Listener:
        told: ClassVar[list[str]] = []

        def step(self, step, total, preview): ...

        def notify(self, text):
            self.told.append(text)

        def interrupted(self):
            return False

    with reporting_to(Listener()):
        CascadeTextEncode.execute(load_for_node(stage.folder), "a red dog", "no circle, a cat")
    first, second = Listener.told
    assert ["'dog'" in first, "'cat'" in second] == [True, True]


def test_what_loras_teach_is_no_unknown_word(stage):
    stage.told.clear()
    house = Adapter("house", "kohya", {}, {}, metadata={"modelspec.trigger_phrase": "a House, van Gogh's"})
    stage.text.with_adapter(house, 1.0).encode(["a red house, van gogh's"])
    assert stage.told == []
    stage.text.with_adapter(replace(house, metadata={}), 1.0).encode(["a red house"])
    assert len(stage.told) == 1


def test_an_encoder_that_states_none_says_nothing():
    told: list[str] = []
    device = ComputeDevice(device=torch.device("cpu"), observer=RunObserver(told.append))
    text = load_text_encoder(WEIGHTS / "demo_text_encoder", device)
    if not text.encoder.tokenizer.words:
        text.encode(["a lighthouse in a storm"])
        assert told == []
