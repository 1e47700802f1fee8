"""Captions are encoded once, come back as the encoder gave them, and outlive it."""

import pytest
import torch

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.text.encoder import TextEncoder, Tokenizer, build_text_model
from cascade_nodes.cascade_core.text.tokenizer import build_small_vocabulary
from cascade_nodes.cascade_core.training.data.text_cache import TextCache

VOCABULARY, MERGES = build_small_vocabulary(["a", "red", "blue", "star", "ring", "left", "of"])
CONFIG = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "projection_dim": 48, "vocab_size": len(VOCABULARY), "hidden_act": "gelu",
}  # fmt: skip
LONG = "red star " * 50  # two chunks
CAPTIONS = ["a red star", LONG, "a blue ring", "", "a red star"]


class Counting(TextEncoder):
    """Counts the prompts that it encodes."""

    encoded = 0

    def encode(self, prompts, learned=()):
        self.encoded += len(prompts)
        return super().encode(prompts, learned)


def encoder(seed: int = 0) -> Counting:
    torch.manual_seed(seed)
    return Counting(build_text_model(CONFIG).eval(), Tokenizer.from_vocabulary(VOCABULARY, MERGES))


def assert_close(value, reference):
    assert value.dtype == torch.float32
    assert value.shape == reference.shape
    assert (value - reference).abs().max() <= 2**-11 * reference.abs().max()


@pytest.mark.parametrize("on_disk", [False, True])
def test_states_are_the_encoders(tmp_path, on_disk):
    text = encoder()
    cache = TextCache(text, tmp_path if on_disk else None)
    states, pooled = cache.states(CAPTIONS)
    expected = text.encode(CAPTIONS)
    assert states.shape == (5, 154, 64)
    assert_close(states, expected.states)
    assert_close(pooled, expected.pooled)
    short, _ = cache.states(CAPTIONS[2:])
    assert torch.equal(short, states[2:, :77])


def test_each_distinct_caption_is_encoded_once(tmp_path):
    text = encoder()
    cache = TextCache(text, tmp_path)
    reports = []
    cache.fill(CAPTIONS * 3, report=lambda *counts: reports.append(counts))
    assert text.encoded == 4
    assert reports[-1] == (3, 3)
    cache.states(CAPTIONS)
    assert text.encoded == 4

    again = encoder()
    kept = TextCache(again, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(kept.states(CAPTIONS), cache.states(CAPTIONS), strict=True))
    assert again.encoded == 0
    other = encoder(seed=1)  # other weights
    TextCache(other, tmp_path).fill(CAPTIONS)
    assert other.encoded == 4


def test_the_encoder_can_be_let_go():
    cache = TextCache(encoder())
    cache.fill(CAPTIONS)
    before = cache.states(CAPTIONS)
    cache.release()
    assert cache.encoder is None
    assert all(torch.equal(a, b) for a, b in zip(before, cache.states(CAPTIONS), strict=True))
    with pytest.raises(CascadeError, match="The caption 'a star' was not encoded before"):
        cache.states(["a star"])


def test_many_captions_are_encoded_in_parts():
    words = ["a", "red", "blue", "star", "ring", "left", "of"]
    captions = [f"{a} {b} {c}" for a in words for b in words for c in words]  # 343
    text = encoder()
    cache = TextCache(text)
    states, pooled = cache.states(captions)
    expected = text.encode(captions[-3:])
    assert_close(states[-3:], expected.states)
    assert_close(pooled[-3:], expected.pooled)
