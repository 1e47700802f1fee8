"""Guidance: the published formula, per image, and what the Guider gives the model."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from cascade_nodes.cascade_core import CascadeError, StageC, load_published_state_dict
from cascade_nodes.cascade_core.diffusion.guidance import Guider, guide

GOLDEN = Path(__file__).parents[1] / "golden"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def stage_c():
    with safe_open(GOLDEN / "stage_c.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if name.startswith("weights.")]  # noqa: SIM118 (no mapping)
        weights = {name.removeprefix("weights."): file.get_tensor(name) for name in names}
        config = json.loads(file.metadata()["config"])
    return load_published_state_dict(StageC.from_config(config), weights).eval()


def conditions(rows: int = 1, tokens: int = 11, seed: int = 1) -> dict[str, torch.Tensor]:
    return {
        "clip_text": normal(rows, tokens, 40, seed=seed),
        "clip_text_pooled": normal(rows, 1, 40, seed=seed + 1),
        "clip_img": normal(rows, 1, 24, seed=seed + 2),
    }


X = normal(2, 16, 6, 8)
R = torch.tensor([0.3, 0.7])


class Recorder(nn.Module):
    """Passes calls on and keeps what it was given."""

    def __init__(self, model):
        super().__init__()
        self.model, self.calls = model, []

    def forward(self, x, r, **given):
        self.calls.append((x, r, given))
        return self.model(x, r, **given)


# The formula


def test_one_image_is_guided_as_published():
    cond, uncond = normal(1, 4, 5, 6), normal(1, 4, 5, 6, seed=1)
    mixed = uncond + 4.0 * (cond - uncond)
    expected = 0.7 * mixed * cond.std() / mixed.std() + 0.3 * mixed
    assert torch.allclose(guide(cond, uncond, 4.0, 0.7), expected, atol=1e-5)


def test_cfg_1_is_the_prompt_and_rescale_0_is_off():
    cond, uncond = normal(2, 4, 5, 6), normal(2, 4, 5, 6, seed=1)
    assert torch.allclose(guide(cond, uncond, 1.0, 0.7), cond, atol=1e-6)
    assert torch.equal(guide(cond, uncond, 4.0, 0.0), torch.lerp(uncond, cond, 4.0))


def test_full_rescale_keeps_the_prompts_deviation():
    cond, uncond = normal(3, 4, 5, 6), normal(3, 4, 5, 6, seed=1)
    guided = guide(cond, uncond, 6.0, 1.0)
    assert torch.allclose(guided.std((1, 2, 3)), cond.std((1, 2, 3)), rtol=1e-5)


def test_an_image_does_not_depend_on_its_batch():
    cond = normal(3, 4, 5, 6) * torch.tensor([0.1, 1.0, 10.0]).view(3, 1, 1, 1)
    uncond = normal(3, 4, 5, 6, seed=1)
    batch = guide(cond, uncond, 4.0, 0.7)
    for i in range(3):
        assert torch.allclose(
            batch[i : i + 1], guide(cond[i : i + 1], uncond[i : i + 1], 4.0, 0.7), rtol=1e-6
        )


def test_half_precision_predictions_are_guided_in_float32():
    cond, uncond = normal(1, 4, 5, 6).half() * 1000, normal(1, 4, 5, 6, seed=1).half() * 1000
    guided = guide(cond, uncond, 100.0, 0.7)  # beyond half's 65504
    assert guided.dtype == torch.float32
    assert torch.equal(guided, guide(cond.float(), uncond.float(), 100.0, 0.7))


@pytest.mark.parametrize("rescale", [-0.1, 1.1, math.nan])
def test_rescale_outside_0_to_1_is_refused(rescale, stage_c):
    with pytest.raises(CascadeError, match=r"cfg_rescale is .*within 0 .* and 1"):
        guide(X, X, 4.0, rescale)
    with pytest.raises(CascadeError, match="cfg_rescale"):
        Guider(stage_c, conditions(), conditions(), 4.0, rescale)


@pytest.mark.parametrize("cfg", [math.nan, math.inf])
def test_cfg_that_is_no_number_is_refused(cfg, stage_c):
    with pytest.raises(CascadeError, match=r"cfg is .*finite"):
        Guider(stage_c, conditions(), conditions(), cfg)


# The Guider


@torch.no_grad()
def test_both_prompts_run_in_one_batch_that_equals_two_runs(stage_c):
    model, positive, negative = Recorder(stage_c), conditions(), conditions(rows=2, seed=5)
    guided = Guider(model, positive, negative, cfg=4.0)(X, R)
    assert [len(x) for x, _, _ in model.calls] == [4]
    both = {name: value.expand(2, *value.shape[1:]) for name, value in positive.items()}
    expected = guide(stage_c(X, R, **both), stage_c(X, R, **negative), 4.0, 0.7)
    assert (guided - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize(("cfg", "negative"), [(1.0, conditions(seed=5)), (4.0, None)])
def test_without_guidance_only_the_prompt_runs(stage_c, cfg, negative):
    model, positive = Recorder(stage_c), conditions(rows=2)
    assert torch.equal(Guider(model, positive, negative, cfg)(X, R), stage_c(X, R, **positive))
    assert [len(x) for x, _, _ in model.calls] == [2]


@torch.no_grad()
def test_prompts_of_different_length_run_one_after_the_other(stage_c):
    model, positive, negative = Recorder(stage_c), conditions(2, tokens=22), conditions(2, seed=5)
    guided = Guider(model, positive, negative, cfg=4.0)(X, R)
    assert [len(x) for x, _, _ in model.calls] == [2, 2]
    assert torch.equal(guided, guide(stage_c(X, R, **positive), stage_c(X, R, **negative), 4.0, 0.7))


@torch.no_grad()
def test_what_one_side_lacks_counts_as_zeros(stage_c):
    residuals = [None, normal(1, 64, 3, 4, seed=9), None, normal(1, 64, 3, 4, seed=10)]
    extra = {"control": residuals, "sca": torch.tensor([0.4]), "crp": None}
    positive, negative = conditions(2) | extra, conditions(2, seed=5)
    del negative["clip_img"]
    model = Recorder(stage_c)
    guided = Guider(model, positive, negative, cfg=4.0)(X, R)
    assert len(model.calls) == 1
    given = model.calls[0][2]
    assert given["crp"] is None
    assert [None if r is None else r.shape[0] for r in given["control"]] == [None, 4, None, 4]
    cond = stage_c(X, R, **conditions(2), control=residuals, sca=torch.tensor([0.4, 0.4]))
    uncond = stage_c(X, R, **negative, clip_img=torch.zeros(2, 1, 24))
    expected = guide(cond, uncond, 4.0, 0.7)
    assert (guided - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_a_bf16_model_gets_bf16_features_but_float32_times(stage_c):
    model = Recorder(StageC.from_config(vars(stage_c.config)))
    model.model.load_state_dict(stage_c.state_dict())
    model.bfloat16().eval()
    positive = conditions(2) | {"sca": torch.tensor([0.123456])}
    guided = Guider(model, positive, conditions(2, seed=5), cfg=4.0)(X, R)
    x, r, given = model.calls[0]
    assert x.dtype == given["clip_text"].dtype == torch.bfloat16
    assert r.dtype == given["sca"].dtype == torch.float32
    assert given["sca"][:2].tolist() == positive["sca"].tolist() * 2
    assert guided.dtype == torch.float32
    exact = Guider(stage_c, positive, conditions(2, seed=5), cfg=4.0)(X, R)
    assert (guided - exact).norm() <= 0.1 * exact.norm()


@torch.no_grad()
def test_a_guider_serves_batches_of_any_size_and_keeps_its_inputs(stage_c):
    positive, negative = conditions(), conditions(seed=5)
    copies = [{name: value.clone() for name, value in side.items()} for side in (positive, negative)]
    guider = Guider(stage_c, positive, negative, cfg=4.0)
    two, one, again = guider(X, R), guider(X[:1], R[:1]), guider(X, R)
    assert torch.equal(two, again)
    assert (two[:1] - one).abs().max() <= 1e-5 * two.abs().max()
    for side, copy in zip((positive, negative), copies, strict=True):
        assert all(torch.equal(side[name], copy[name]) for name in copy)


def test_a_condition_of_the_wrong_batch_is_refused_by_name(stage_c):
    guider = Guider(stage_c, conditions(rows=3), conditions(), cfg=4.0)
    with pytest.raises(CascadeError, match="clip_text has 3 rows for a batch of 2"):
        guider(X, R)
