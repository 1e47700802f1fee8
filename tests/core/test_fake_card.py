"""A picture on a card that is not NVIDIA's, and has the faults that Apple's has (fake_card.py)."""

from typing import Any

import numpy as np
import pytest

from cascade_nodes.cascade_core.arguments import StageSettings
from cascade_nodes.cascade_core.engine import blocks
from cascade_nodes.cascade_core.stages import device as stages_device
from cascade_nodes.demo.door import StableCascade
from cascade_nodes.tests.core.fake_card import DEVICE, FakeCard

FEW: Any = {"size": (128, 128), "steps": 2, "decoder": StageSettings(steps=2, cfg=1.1)}


@pytest.fixture
def on_card(monkeypatch):
    monkeypatch.setattr(stages_device, "chosen_device", lambda device: DEVICE)
    # Tensors on the fake card have no addresses to compare.
    monkeypatch.setattr(blocks, "side_by_side", lambda weights: weights if len(weights) > 1 else weights[0])


def test_a_picture_and_one_that_follows_it(on_card, monkeypatch):
    with FakeCard() as card:
        cascade = StableCascade.demo(dtype="fp32")
        made = cascade("a red circle", seed=3, **FEW)[0]
        follows = cascade("a blue square", image=made, denoise=0.5, seed=4, **FEW)[0]
    assert card.computed > 1000
    monkeypatch.undo()
    cascade = StableCascade.demo(dtype="fp32", device="cpu")
    expected = cascade("a red circle", seed=3, **FEW)[0]
    assert difference(made, expected) <= 1  # the same noise; the text encoder computes in fp16 on a card
    expected = cascade("a blue square", image=made, denoise=0.5, seed=4, **FEW)[0]
    assert difference(follows, expected) <= 2


def test_fp16_with_its_stream_as_a_fraction(on_card):
    with FakeCard():
        latent = StableCascade.demo(dtype="fp16").prior("a red circle", size=(128, 128), seed=3, steps=2)
    assert latent.isfinite().all()


def difference(one, other) -> int:
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())
