"""Tokens that go on from a file."""

import pytest
import torch

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.adapters import read_adapter
from cascade_nodes.cascade_core.training.checks import check_networks
from cascade_nodes.cascade_core.training.data.sources import find_all
from cascade_nodes.cascade_core.training.identity import contents_of, differences
from cascade_nodes.cascade_core.training.run import train
from cascade_nodes.cascade_core.training.settings import TokenSettings
from cascade_nodes.tests.core.training_runs import loop_of, settings_of, write_world


def test_a_token_goes_on_from_a_file(tmp_path):
    world = write_world(tmp_path)
    first = settings_of(world, "tokens", tmp_path / "first", train={"steps": 2})
    train(first)
    file = tmp_path / "first" / "out.safetensors"
    (learned,) = read_adapter(file).tokens

    def settings(**token):
        token = {"name": "blob", "vectors": 2, "start": str(file), **token}
        return settings_of(world, "tokens", tmp_path / "second", tokens=[token], train={"steps": 1})

    loop = loop_of(settings())
    assert torch.equal(loop.task.trained.vectors, learned.vectors.float())
    pictures, _ = find_all(settings().data)
    check_networks(settings(), pictures)
    with pytest.raises(CascadeError, match="give vectors: 2, or another file"):
        check_networks(settings(vectors=1), pictures)

    metadata = {"settings": settings().as_json(), "contents": ""}
    held = contents_of(settings(), pictures, str(tmp_path / "cache"), 1)
    assert "tokens.0.start file" in held
    moved = tmp_path / "moved.safetensors"
    file.rename(moved)
    assert contents_of(settings(start=str(moved)), pictures, str(tmp_path / "cache"), 1) == held
    assert differences(settings(start=str(moved)), {}, metadata) == []


def test_a_token_begins_as_one_thing():
    with pytest.raises(CascadeError, match="both say what a token begins as"):
        TokenSettings(name="blob", initial="star", start="x.safetensors")
