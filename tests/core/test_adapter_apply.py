"""Adapters applied: the published numbers, DoRA written out, strengths, precisions; and everything back as it was."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cascade_nodes.cascade_core import CascadeError, StageC, load_published_state_dict
from cascade_nodes.cascade_core.adapters import LowRank
from cascade_nodes.cascade_core.adapters.apply import Patch, changed_weight, patched
from cascade_nodes.cascade_core.adapters.changes import (
    Difference,
    Hadamard,
    Kronecker,
    Replacement,
    Scaling,
)
from cascade_nodes.cascade_core.adapters.compatibility import check_finite_changes
from cascade_nodes.cascade_core.adapters.rotations import ColumnRotation, RowRotation
from cascade_nodes.tests.core.live_bytes import LiveBytes
from cascade_nodes.tests.golden_weights import read_golden, relative_error

LORA, ABOUT = read_golden("stage_c_lora")
STAGE_C, STAGE_C_ABOUT = read_golden("stage_c")
INPUTS = [STAGE_C[f"in.{name}"] for name in ("x", "r", "clip_text", "clip_text_pooled", "clip_img")]
DOWN, UP = "lora_down.weight", "lora_up.weight"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def golden_changes() -> dict[str, LowRank]:
    """The golden LoRA by our module names, from its kohya form."""
    changes = {}
    for key, down in LORA.items():
        if key.startswith("kohya.") and key.endswith(DOWN):
            stem = key.removesuffix(f".{DOWN}")
            block, part = stem.removeprefix("kohya.lora_unet_").split("_attention_attn_")
            direction, _, level, index = block.split("_")
            name = f"{direction}_blocks.{level}.{index}.attention.attn.{part}"
            changes[name] = LowRank(down, LORA[f"{stem}.{UP}"], LORA[f"{stem}.alpha"].item())
    return changes


@pytest.fixture(scope="module")
def stage_c() -> nn.Module:
    weights = {key.removeprefix("weights."): w for key, w in STAGE_C.items() if key.startswith("weights.")}
    return load_published_state_dict(StageC.from_config(STAGE_C_ABOUT["config"]), weights).eval()


@torch.no_grad()
def output(network: nn.Module) -> Tensor:
    return network(*INPUTS)


def test_the_published_output(stage_c):
    with patched(stage_c, [Patch("golden", golden_changes())]):
        assert relative_error(output(stage_c), LORA["out.official"]) <= 1e-5
    assert relative_error(output(stage_c), STAGE_C["out"]) <= 1e-5


def test_afterwards_every_weight_is_the_same_tensor(stage_c):
    held = {name: (weight, weight.clone()) for name, weight in stage_c.named_parameters()}
    changes = golden_changes()
    with patched(stage_c, [Patch("golden", changes, 0.7), Patch("again", changes, -2.0)]):
        for name, weight in stage_c.named_parameters():
            touched = name.removesuffix(".weight") in changes
            assert (weight is held[name][0]) != touched, name  # what no adapter touches has no second copy
    for name, weight in stage_c.named_parameters():
        assert weight is held[name][0]
        assert torch.equal(weight, held[name][1])


def test_an_error_inside_leaves_nothing_changed(stage_c):
    before = dict(stage_c.named_parameters())
    with pytest.raises(KeyboardInterrupt), patched(stage_c, [Patch("golden", golden_changes())]):
        raise KeyboardInterrupt
    # The last change is the wrong one.
    wrong = golden_changes() | {"clf.1": LowRank(randn(2, 5), randn(16, 2))}
    with pytest.raises(CascadeError), patched(stage_c, [Patch("golden", wrong)]):
        pass
    assert all(weight is before[name] for name, weight in stage_c.named_parameters())


def test_blocks_may_be_nested(stage_c):
    one, other = Patch("one", golden_changes(), 0.5), Patch("other", golden_changes(), 0.25)
    with patched(stage_c, [one, other]):
        both = output(stage_c)
    with patched(stage_c, [one]), patched(stage_c, [other]):
        assert relative_error(output(stage_c), both) <= 1e-5
    assert relative_error(both, output(stage_c)) > 1e-2


def test_strengths_add_and_cancel(stage_c):
    changes = golden_changes()
    with patched(stage_c, [Patch("golden", changes, 0.3), Patch("golden", changes, 0.7)]):
        assert relative_error(output(stage_c), LORA["out.official"]) <= 1e-5
    with patched(stage_c, [Patch("golden", changes, 1.5), Patch("golden", changes, -1.5)]):
        assert relative_error(output(stage_c), STAGE_C["out"]) <= 1e-5
    with patched(stage_c, [Patch("golden", changes, -1.0)]):
        assert relative_error(output(stage_c), STAGE_C["out"]) > 1e-2


def test_strength_zero_is_none_exactly(stage_c):
    before = dict(stage_c.named_parameters())
    with patched(stage_c, [Patch("golden", golden_changes(), 0.0)]):
        assert all(weight is before[name] for name, weight in stage_c.named_parameters())


torch.manual_seed(0)
LAYERS: dict[str, nn.Linear | nn.Conv2d] = {
    "linear": nn.Linear(6, 8),
    "1 × 1": nn.Conv2d(6, 8, 1),
    "3 × 3": nn.Conv2d(6, 8, 3),
    "depthwise": nn.Conv2d(8, 8, 3, groups=8),
}


def change_of(layer: nn.Linear | nn.Conv2d, rank: int = 2, **more) -> LowRank:
    """A random change, shaped as in the dialects."""
    weight = layer.weight
    ends = [1] * (weight.ndim - 2)
    return LowRank(randn(rank, *weight.shape[1:]), randn(len(weight), rank, *ends, seed=1), **more)


@pytest.mark.parametrize("name", list(LAYERS))
def test_alpha_over_rank(name):
    weight, change = LAYERS[name].weight.detach(), change_of(LAYERS[name], alpha=0.5)
    delta = torch.einsum("or,r...->o...", change.up.flatten(1), change.down)
    expected = weight + -2.0 * (0.5 / 2) * delta
    torch.testing.assert_close(changed_weight(weight, change, -2.0), expected, rtol=1e-6, atol=1e-6)
    without = LowRank(change.down, change.up)
    torch.testing.assert_close(changed_weight(weight, without, 1.0), weight + delta, rtol=1e-6, atol=1e-6)


def test_onetrainers_depthwise_form():
    weight = LAYERS["depthwise"].weight.detach()
    change = LowRank(randn(2, 8, 3, 3), randn(1, 2, 1, 1), alpha=1.0)
    delta = torch.einsum("r,rcyx->cyx", change.up.flatten(), change.down)[:, None]
    torch.testing.assert_close(
        changed_weight(weight, change, 3.0), weight + 1.5 * delta, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("strength", [1.0, 0.4, -0.5])
@pytest.mark.parametrize("by", ["row", "column"])
@pytest.mark.parametrize("name", list(LAYERS))
def test_dora_written_out(name, by, strength):
    weight = LAYERS[name].weight.detach()
    kept = 0 if by == "row" else 1
    shape = [size if dim == kept else 1 for dim, size in enumerate(weight.shape)]
    magnitude = randn(*shape, seed=2).abs() + 0.1
    change = change_of(LAYERS[name], alpha=1.0, magnitude=magnitude)
    full = weight + 0.5 * torch.einsum("or,r...->o...", change.up.flatten(1), change.down)
    for index in range(weight.shape[kept]):
        # Each row or column by itself has the norm that the magnitude says.
        part = full.select(kept, index)
        part.mul_(magnitude.flatten()[index] / part.norm())
    expected = weight + strength * (full - weight)
    torch.testing.assert_close(changed_weight(weight, change, strength), expected, rtol=1e-5, atol=1e-6)


def test_a_dead_row_stays_finite():
    change = LowRank(torch.zeros(2, 6), torch.zeros(8, 2), magnitude=torch.ones(8, 1))
    assert torch.equal(changed_weight(torch.zeros(8, 6), change, 1.0), torch.zeros(8, 6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_any_precision_is_computed_in_float32(dtype):
    layer = deepcopy(LAYERS["linear"]).to(dtype)
    original, change = layer.weight, change_of(layer)
    patches = [Patch("half", {"0": change}, 0.01) for _ in range(20)]  # each too small to move an fp8 weight
    network = nn.Sequential(layer)
    with patched(network, patches):
        assert layer.weight.dtype == dtype
        expected = changed_weight(original.detach(), change, 0.2).to(dtype)
        error = (layer.weight.detach().float() - expected.float()).abs()
        assert (error <= 2 * torch.finfo(dtype).eps * expected.float().abs()).all()  # at most the next value
        assert not torch.equal(layer.weight.float(), original.float())
    assert layer.weight is original


def test_halves_in_the_file():
    weight, change = LAYERS["linear"].weight.detach(), change_of(LAYERS["linear"])
    half = LowRank(change.down.half(), change.up.half())
    exact = LowRank(half.down.float(), half.up.float())
    assert torch.equal(changed_weight(weight, half, 1.0), changed_weight(weight, exact, 1.0))


@torch.no_grad()
def test_biases_and_norms_are_changed_as_weights_are(stage_c):
    parameters = dict(stage_c.named_parameters())
    changes = {
        name: Difference(randn(p.numel())) for name, p in parameters.items() if not name.endswith("weight")
    }
    assert {name.rpartition(".")[2] for name in changes} == {"bias", "gamma", "beta"}
    with patched(stage_c, [Patch("a", changes, 0.5)]):
        inside = dict(stage_c.named_parameters())
        for name, parameter in parameters.items():
            if name in changes:
                expected = parameter + 0.5 * changes[name].difference.view(parameter.shape)
                torch.testing.assert_close(inside[name], expected, rtol=1e-6, atol=1e-6)
            else:
                assert inside[name] is parameter
    assert all(parameter is parameters[name] for name, parameter in stage_c.named_parameters())


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        LowRank(randn(4, 256), randn(256, 4)),
        Hadamard(randn(4, 256), randn(256, 4), randn(4, 256), randn(256, 4)),
        Kronecker(randn(8, 8), randn(32, 2), None, randn(2, 32)),
        Difference(randn(256, 256).half()),
        Replacement(randn(256, 256).half()),
        Scaling(randn(256, 1)),
        RowRotation(randn(64, 4, 4), randn(256, 1)),
        RowRotation(randn(3, 64, 4, 4)),
        ColumnRotation(randn(64, 6), None, 5),
        ColumnRotation(randn(3, 64, 4, 4), randn(256, 1)),
    ],
    ids=lambda change: f"{type(change).__name__}",
)
def test_no_change_takes_more_memory_than_a_plain_lora(change):
    """The weight in float32, the change or what it makes of the weight, and the result."""
    weight = randn(256, 256).half()
    with LiveBytes() as live:
        result = changed_weight(weight, change, 0.5)
    assert result.shape == (256, 256)
    assert live.peak <= 3.5 * 4 * weight.numel()  # and the factors


def test_training_goes_on_outside(stage_c):
    """The block computes its weights without gradients, and leaves gradients as they are set inside it."""
    with patched(stage_c, [Patch("golden", golden_changes())]):
        assert torch.is_grad_enabled()
        assert not stage_c.get_submodule("down_blocks.0.2.attention.attn.to_q").weight.requires_grad


@pytest.mark.parametrize(
    ("layer", "change", "words"),
    [
        (
            "nowhere.3",
            LowRank(randn(2, 6), randn(8, 2)),
            "a.safetensors changes nowhere.3, which this model does not",
        ),
        (
            "down_blocks",
            LowRank(randn(2, 6), randn(8, 2)),
            "changes down_blocks, which this model does not have",
        ),
        (
            "clf.1",
            LowRank(randn(2, 6), randn(8, 2)),
            r"a.safetensors changes clf.1 as a weight of \(8, 6\), but it is \(16, 64, 1, 1\) here; choose",
        ),
    ],
)
def test_what_does_not_fit_is_named(stage_c, layer, change, words):
    with (
        pytest.raises(CascadeError, match=words),
        patched(stage_c, [Patch("a.safetensors", {layer: change})]),
    ):
        pass


@pytest.mark.parametrize("part", ["down", "up", "magnitude"])
def test_nan_is_named(part):
    whole = LowRank(randn(2, 6), randn(8, 2), magnitude=torch.ones(8, 1))
    check_finite_changes({"a.b": whole}, "a.safetensors")
    broken = replace(whole, **{part: torch.tensor([[torch.nan]])})
    with pytest.raises(CascadeError, match=rf"a.safetensors holds NaN or infinity in {part} of a\.b"):
        check_finite_changes({"a.b": broken}, "a.safetensors")
