"""Training in fp16, for cards without bf16: gradients as in float32, a scale of the loss that works and resumes."""

import copy

import pytest
import torch

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.networks.fp16 import scale_residual_stream
from cascade_nodes.cascade_core.networks.stage_c import StageC
from cascade_nodes.cascade_core.training import loop as loops
from cascade_nodes.cascade_core.training.gradient_checkpointing import checkpoint_blocks
from cascade_nodes.cascade_core.training.launch import compute_dtype
from cascade_nodes.cascade_core.training.state import STATE, read_state, write_state
from cascade_nodes.cascade_core.training.tasks.low_rank import LowRankChanges, select_layers
from cascade_nodes.tests.core.overflowing import STAGE_C, overflowing
from cascade_nodes.tests.core.training_runs import loop_of, run_until_killed, same, settings_of, write_world

KINDS = ["lora", "lora, adaptive", "controlnet", "finetune", "tokens"]
FP16 = {"precision": "fp16"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def everything(loop) -> dict[str, torch.Tensor]:
    loop.save()
    return {
        f"{part}.{k}": v for part, each in read_state(loop.folder / STATE)[0].items() for k, v in each.items()
    }


@pytest.mark.parametrize("name", KINDS)
def test_a_killed_run_goes_on_with_its_scale_bit_for_bit(world, tmp_path, name, monkeypatch):
    """The scale falls and rises again, before the kill and after it; steps that overflow change nothing."""
    monkeypatch.setattr(loops, "LOSS_SCALE", 2.0**17)
    monkeypatch.setattr(loops, "LOSS_SCALE_STEPS", 2)
    whole = loop_of(settings_of(world, name, tmp_path / "whole", train=FP16))
    whole.run()
    scales = [row["loss_scale"] for row in whole.log.rows]
    assert scales[-1] < 2.0**17
    assert len(set(scales)) > 1
    settings = settings_of(world, name, tmp_path / "killed", train=FP16)
    run_until_killed(settings, 5 * settings.train.accumulate)
    resumed = loop_of(settings)
    assert resumed.resume()
    assert resumed.step == 3
    resumed.run()
    ended = everything(whole)
    assert {"scaler.scale", "scaler._growth_tracker"} <= ended.keys()
    assert same(everything(resumed), ended)
    assert resumed.log.rows[-1]["loss_scale"] == scales[-1]


def test_a_run_that_scales_nothing_keeps_no_scale(world, tmp_path):
    loop = loop_of(settings_of(world, "lora", tmp_path))
    loop.run()
    assert not any(name.startswith("scaler.") for name in everything(loop))
    assert "loss_scale" not in loop.log.rows[-1]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_of_a_stream_past_the_end_of_fp16_are_those_of_float32(checkpointed):
    """A published Stage C's stream grows past 65,504, where fp16 as it comes gives NaN."""
    torch.manual_seed(0)
    network = overflowing(StageC.from_config(STAGE_C))
    latent = torch.randn(2, 16, 8, 8)
    others = torch.tensor([0.3, 0.9]), torch.randn(2, 7, 32), torch.randn(2, 1, 32), torch.zeros(2, 1, 24)

    def gradient(dtype: torch.dtype, held: bool, scale: float = 32.0) -> torch.Tensor:
        copied = copy.deepcopy(network).to(dtype)
        if held:
            scale_residual_stream(copied)
        changes = LowRankChanges(
            select_layers(copied, ("all",)), 4, None, dtype, torch.Generator().manual_seed(1)
        )
        with torch.no_grad():  # up is zero at the beginning, so that down would have no gradient
            changes.vector.copy_(
                torch.randn(changes.vector.shape, generator=torch.Generator().manual_seed(2)) / 1000
            )
        if checkpointed:
            checkpoint_blocks(copied, changes.contexts)
        with changes.applied():
            r, *conditions = others
            out = copied(latent.to(dtype), r, *(value.to(dtype) for value in conditions))
            (out.float().square().mean() * scale).backward()
        assert changes.vector.grad is not None
        return changes.vector.grad / scale

    exact = gradient(torch.float32, False)
    assert torch.allclose(
        gradient(torch.float32, True), exact, rtol=1e-3, atol=1e-4 * exact.abs().max().item()
    )
    assert not gradient(torch.float16, False).isfinite().all()
    found = gradient(torch.float16, True)
    assert torch.cosine_similarity(found, exact, dim=0) > 0.9999
    # What the scale of the loss is for: small gradients vanish below it, large ones overflow above.
    assert torch.cosine_similarity(gradient(torch.float16, True, 2.0**-5), exact, dim=0) < 0.995
    assert not gradient(torch.float16, True, 1024.0).isfinite().all()


def test_gradients_that_overflow_at_any_scale_end_the_run(world, tmp_path, monkeypatch):
    monkeypatch.setattr(loops, "MIN_LOSS_SCALE", 2.0**11)
    with pytest.raises(
        CascadeError, match=r"overflow in fp16 at any scale of the loss, at step 2.*precision to fp32"
    ):
        loop_of(settings_of(world, "lora", tmp_path, train=FP16)).run()


@pytest.mark.parametrize("scale", [float("nan"), 0.0, -1.0, float("inf")])
def test_a_damaged_scale_is_refused(world, tmp_path, scale):
    settings = settings_of(world, "lora", tmp_path, train={**FP16, "steps": 1})
    loop_of(settings).run()
    parts, metadata = read_state(tmp_path / STATE)
    parts["scaler"]["scale"] = torch.tensor(scale, dtype=torch.float64)
    write_state(tmp_path / STATE, parts, metadata)
    with pytest.raises(CascadeError, match="no scale of the loss that a run can go on with"):
        loop_of(settings).resume()


@pytest.mark.parametrize(("supported", "dtype"), [(False, torch.float16), (True, torch.bfloat16)])
def test_auto_is_fp16_where_bf16_is_emulated(monkeypatch, supported, dtype):
    """A T4 or V100 claims bf16 where emulation counts as support."""
    asked = []

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return supported or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert compute_dtype("auto", torch.device("cuda")) == dtype
    assert asked == [False]
    assert compute_dtype("bf16", torch.device("cuda")) == torch.bfloat16
    assert compute_dtype("auto", torch.device("cpu")) == torch.float32
