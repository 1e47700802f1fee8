"""Stage A, B, C and the previewer against the published code's numbers."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from cascade_nodes.cascade_core import (
    CascadeError,
    Previewer,
    StageA,
    StageB,
    StageC,
    infer_config,
    load_published_state_dict,
)
from cascade_nodes.cascade_core.checkpoints import NETWORKS, fuse_attention, split_attention
from cascade_nodes.cascade_core.networks.config import PRESETS
from cascade_nodes.cascade_core.networks.layers import timestep_embedding

GOLDEN = Path(__file__).parents[1] / "golden"
MANIFESTS = json.loads(gzip.decompress((GOLDEN / "checkpoint_manifests.json.gz").read_bytes()))


def read(name: str) -> tuple[Any, dict, dict, dict]:
    """(model, weights, everything else, config) of a golden file"""
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    weights = {key[len("weights.") :]: value for key, value in tensors.items() if key.startswith("weights.")}
    network = {"stage_a": StageA, "stage_b": StageB, "stage_c": StageC, "previewer": Previewer}[name]
    model = load_published_state_dict(network.from_config(config), weights).eval()
    return model, weights, tensors, config


def assert_close(value: torch.Tensor, reference: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert value.shape == reference.shape
    assert (value - reference).abs().max() <= tolerance * reference.abs().max()


@torch.no_grad()
def test_stage_c_as_published():
    model, _, t, _ = read("stage_c")
    inputs = [t[f"in.{name}"] for name in ("x", "r", "clip_text", "clip_text_pooled", "clip_img")]
    control = [t.get(f"in.cnet.{i}") for i in range(5)]
    assert_close(model(*inputs), t["out"])
    assert_close(model(*inputs, sca=t["in.sca"], crp=t["in.crp"]), t["out.sca_crp"])
    assert_close(model(*inputs, control=control), t["out.cnet"])
    assert_close(model(*inputs, control=[None] * 6), t["out"])


@torch.no_grad()
def test_stage_b_as_published():
    model, _, t, _ = read("stage_b")
    r, effnet, clip = t["in.r"], t["in.effnet"], t["in.clip"]
    assert_close(model(t["in.x"], r, effnet, clip), t["out"])
    assert_close(model(t["in.x"], r, effnet, clip, sca=t["in.sca"]), t["out.sca"])
    assert_close(model(t["in.x"], r, effnet, clip, pixels=t["in.pixels"]), t["out.pixels"])
    assert_close(model(t["in.x.odd"], r, effnet, clip), t["out.odd"])


@torch.no_grad()
def test_stage_a_as_published():
    model, _, t, _ = read("stage_a")
    assert_close(model.encode(t["in.image"]), t["out.latent"])
    quantised, indices = model.quantize(t["out.latent"])
    assert_close(quantised, t["out.quantised"])
    assert torch.equal(indices, t["out.indices"])
    assert_close(model.decode(t["out.latent"]), t["out.decoded"])


@torch.no_grad()
def test_previewer_as_published():
    model, _, t, _ = read("previewer")
    assert_close(model(t["in.latent"]), t["out.image"])


@pytest.mark.parametrize("name", ["stage_a", "stage_b", "stage_c", "previewer"])
def test_config_is_inferred_from_small_weights(name):
    _, weights, _, config = read(name)
    kind, stated = infer_config(weights, {"config": json.dumps(config)})
    assert kind == name
    assert {key: stated[key] for key in config} == config
    kind, inferred = infer_config(weights)
    assert kind == name
    # heads are 64 wide where nothing else says, and dropout is not in the weights
    hidden = {"nhead", "dropout", "self_attn"}
    assert {key: inferred[key] for key in inferred if key in config and key not in hidden} == {
        key: config[key] for key in inferred if key in config and key not in hidden
    }


@pytest.mark.parametrize(
    ("manifest", "preset"),
    [
        ("stage_c_3.6b", "stage_c_3.6b"),
        ("stage_c_1b", "stage_c_1b"),
        ("stage_b_1.5b", "stage_b_1.5b"),
        ("stage_b_700m", "stage_b_700m"),
        ("stage_a", "stage_a"),
        ("previewer", "previewer"),
        ("host_stage_c_3.6b", "stage_c_3.6b"),
    ],
)
def test_published_files_load_strictly(manifest, preset):
    shapes = MANIFESTS[manifest]
    state = {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for name, (dtype, shape) in shapes.items()
    }
    kind, config = infer_config(state)
    expected_kind, arguments = PRESETS[preset]
    assert kind == expected_kind
    with torch.device("meta"):
        model = NETWORKS[kind].from_config(config)
        assert model.config == NETWORKS[kind].from_config(arguments).config
    load_published_state_dict(model, state)


def test_fused_and_split_attention_are_inverse():
    _, weights, _, _ = read("stage_c")
    split = split_attention(weights)
    assert not any("in_proj" in name for name in split)
    back = fuse_attention(split)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_timestep_embedding_is_float32_for_half_precision_ratios():
    model, _, t, _ = read("stage_c")
    r = torch.tensor([0.7512, 0.7498])
    exact = timestep_embedding(r, 64)
    assert exact.dtype == torch.float32
    assert (timestep_embedding(r.bfloat16(), 64) - exact).abs().max() > 0.5  # what a rounded ratio would give
    half = model.bfloat16()
    inputs = [t[f"in.{name}"].bfloat16() for name in ("clip_text", "clip_text_pooled", "clip_img")]
    with torch.no_grad():
        out = half(t["in.x"].bfloat16(), t["in.r"], *inputs).float()
    assert ((out - t["out"]).norm() / t["out"].norm()) < 0.02


def test_mismatches_are_named():
    _, weights, _, config = read("stage_c")
    model = StageC.from_config(config)
    with pytest.raises(CascadeError, match=r"1 missing \(clf.1.bias\)"):
        load_published_state_dict(model, {k: v for k, v in weights.items() if k != "clf.1.bias"})
    with pytest.raises(CascadeError, match=r"1 unexpected \(extra\)"):
        load_published_state_dict(model, {**weights, "extra": torch.zeros(1)})
    with pytest.raises(CascadeError, match=r"clf.1.bias \(17,\) instead of \(16,\)"):
        load_published_state_dict(model, {**weights, "clf.1.bias": torch.zeros(17)})
    with pytest.raises(CascadeError, match="of no Stable Cascade network"):
        infer_config({"conv.weight": torch.zeros(1)})
    with pytest.raises(CascadeError, match="does not know width"):
        StageC.from_config({"width": 3})
    with pytest.raises(CascadeError, match="does not divide"):
        StageC.from_config({**config, "nhead": [5, 5]})
