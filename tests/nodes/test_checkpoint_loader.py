"""One file or folder with several networks gives what the separate files give."""

from typing import Any

import pytest
import torch

from cascade_nodes.cascade_core.checkpoints import (
    ALL_IN_ONE,
    DIFFUSERS,
    layout_named,
    read_weights,
    write_safetensors,
)
from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.nodes.conditioning import CascadeImagePrompt, CascadeTextEncode
from cascade_nodes.nodes.hosts.roles import DEMO_FOLDER, DEMO_NAMES
from cascade_nodes.nodes.latents import CascadeDecode, CascadeEncode
from cascade_nodes.nodes.loaders import CascadeCheckpointLoader, StageAVAE, StageCLoader

STAGE_C = ("stage_c", "compressor", "previewer")
STAGE_B = ("stage_b", "stage_a")


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.setenv("CASCADE_MODELS", str(tmp_path))
    return tmp_path


def published(part):
    role = "text_encoder" if part == "text" else part
    return read_weights(DEMO_FOLDER / DEMO_NAMES[role], part)[0]


def write_all_in_one(path, parts):
    """Writes a file as ComfyUI saves one: no config anywhere, so that every size is read from the shapes."""
    tensors = {}
    for part in parts:
        tensors |= layout_named(part, ALL_IN_ONE).from_published(published(part))
    write_safetensors(path, tensors, {})


def outputs(node, *inputs) -> tuple[Any, ...]:
    result = node.execute(*inputs).result
    assert result is not None
    return result


def load(name):
    return outputs(CascadeCheckpointLoader, name, "fp32")


def weights(networks):
    return [dict(network.state_dict()) for network, _ in networks]


def test_all_in_one_of_stage_b(models):
    write_all_in_one(models / "checkpoints" / "b.safetensors", STAGE_B)
    model, clip, vae, vision = load("b.safetensors")
    assert model.kind == "stage_b"
    assert vae.kind == "stage_a"
    assert clip is None
    assert vision is None
    alone = outputs(StageAVAE, DEMO_NAMES["stage_a"])[0]
    for mine, theirs in zip(weights(vae.networks()), weights(alone.networks()), strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_all_in_one_of_stage_c(models):
    write_all_in_one(models / "checkpoints" / "c.safetensors", STAGE_C)
    model, _, vae, _ = load("c.safetensors")
    assert model.kind == "stage_c"
    assert vae.kind == "compressor"
    image = torch.rand(1, 96, 96, 3)
    latent = outputs(CascadeEncode, vae, image, 42.67)[0]
    assert outputs(CascadeDecode, vae, latent, 0)[0].shape == (1, 24, 24, 3)


def test_other_loaders_take_their_part(models):
    write_all_in_one(models / "checkpoints" / "c.safetensors", STAGE_C)
    alone = outputs(StageCLoader, DEMO_NAMES["stage_c"], "fp32")[0]
    inside = outputs(StageCLoader, "c.safetensors", "fp32")[0]
    assert all(
        torch.equal(tensor, inside.network.state_dict()[name])
        for name, tensor in alone.network.state_dict().items()
    )


def test_a_folder_of_diffusers(models):
    folder = models / "diffusers" / "stable-cascade"
    for part, place in (("stage_b", "decoder"), ("stage_a", "vqgan")):
        tensors = layout_named(part, DIFFUSERS).from_published(published(part))
        write_safetensors(folder / place / "diffusion_pytorch_model.safetensors", tensors, {})
    (folder / "model_index.json").write_text("{}", encoding="utf-8")
    choices = CascadeCheckpointLoader.GET_NODE_INFO_V1()["input"]["required"]["file"][1]["options"]
    assert "stable-cascade" in choices
    model, clip, vae, _ = load("stable-cascade")
    assert (model.kind, vae.kind, clip) == ("stage_b", "stage_a", None)


def test_what_is_absent_is_refused_by_name(models):
    write_all_in_one(models / "checkpoints" / "b.safetensors", STAGE_B)
    _, clip, vae, vision = load("b.safetensors")
    with pytest.raises(CascadeError, match="holds no text encoder; connect Load Cascade Text Encoder"):
        CascadeTextEncode.execute(clip, "a", "b")
    with pytest.raises(CascadeError, match="holds no image encoder; connect Load Cascade Image Encoder"):
        CascadeImagePrompt.execute([], vision, torch.zeros(1, 8, 8, 3), 1.0)
    with pytest.raises(CascadeError, match="is Stage A, but the semantic compressor is expected"):
        CascadeEncode.execute(vae, torch.zeros(1, 8, 8, 3), 42.67)


def test_a_file_without_stage_b_or_c(models):
    write_all_in_one(models / "checkpoints" / "a.safetensors", ["stage_a"])
    with pytest.raises(CascadeError, match=r"a.safetensors holds Stage A, but an all-in-one checkpoint"):
        load("a.safetensors")
