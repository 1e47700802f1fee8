"""Text states of captions, on the accelerator or not: the same."""

import pytest
import torch

from cascade_nodes.cascade_core.text.encoder import TextEncoder
from cascade_nodes.cascade_core.training.data.text_cache import TextCache
from cascade_nodes.cascade_core.training.tasks.conditions import CachedText, Conditions
from cascade_nodes.tests.nodes.tiny import write_text_encoder

CAPTIONS = ["", "a red star", "a blue circle", "the large star"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    write_text_encoder(folder)
    return TextEncoder.load(folder, torch.float32)


def cached(encoder, captions, resident=10**9) -> CachedText:
    text = CachedText(TextCache(encoder), captions, torch.device("cpu"))
    text.table = text._table(resident)  # on the CPU nothing is gained by one, but it is the same code
    return text


def test_a_table_gives_what_the_cache_gives(encoder):
    ids = torch.tensor([2, 0, 2, 3])
    with_table, without = cached(encoder, CAPTIONS), cached(encoder, CAPTIONS, resident=0)
    assert with_table.table is not None
    assert without.table is None
    for one, other in zip(with_table(ids), without(ids), strict=True):
        assert torch.equal(one.float(), other)
    wanted = encoder.encode([CAPTIONS[i] for i in ids])
    for one, other in zip(with_table(ids), wanted, strict=True):
        assert torch.allclose(one.float(), other, atol=2e-3)


def test_long_captions_do_without_a_table(encoder):
    text = cached(encoder, [*CAPTIONS, "a red star " * 30])
    assert text.table is None
    states, _ = text(torch.tensor([4, 1]))
    assert states.shape[1] == 2 * 77
    alone, _ = text(torch.tensor([1]))
    assert torch.equal(states[1, :77], alone[0])


def test_conditions_have_no_image():
    conditions = Conditions.of(torch.randn(3, 77, 8), torch.randn(3, 6), 5, torch.bfloat16)
    assert [tuple(value.shape) for value in conditions] == [(3, 77, 8), (3, 1, 6), (3, 1, 5)]
    assert {value.dtype for value in conditions} == {torch.bfloat16}
    assert conditions.clip_img.abs().max() == 0


def test_conditions_have_the_images_given():
    prompts = torch.randn(3, 2, 5)
    conditions = Conditions.of(torch.randn(3, 77, 8), torch.randn(3, 6), 5, torch.bfloat16, prompts)
    assert torch.equal(conditions.clip_img, prompts.bfloat16())
