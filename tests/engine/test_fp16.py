"""The engine on a network whose residual stream is held as a fraction, in plain PyTorch and through the kernels."""

from importlib import import_module
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from cascade_nodes.cascade_core import StageB, StageC
from cascade_nodes.cascade_core.adapters.apply import patched
from cascade_nodes.cascade_core.engine import Engine
from cascade_nodes.cascade_core.engine import engine as engine_module
from cascade_nodes.cascade_core.networks.fp16 import STREAM_SCALE, scale_residual_stream
from cascade_nodes.cascade_core.networks.quantisation import E4M3, quantise_network
from cascade_nodes.tests.core import overflowing
from cascade_nodes.tests.core.overflowing import GROWTH
from cascade_nodes.tests.core.test_fp16 import TRAJECTORY, in_fp16, lora, prompt, randn, residuals
from cascade_nodes.tests.engine.test_engine import (
    STAGE_B,
    UNUSUAL,
    build,
    stage_b_inputs,
    stage_c_inputs,
)
from cascade_nodes.tests.golden_weights import relative_error


@pytest.fixture(params=["operations", "cuda", "cublas"], autouse=True)
def operations(request, monkeypatch):
    """Plain PyTorch; the kernels, interpreted; those beside cuBLAS and PyTorch's attention, for cards before Ampere."""
    chosen = import_module(f"cascade_nodes.cascade_core.engine.{request.param}")
    monkeypatch.setattr(engine_module, "operations_on", lambda device, precision: chosen)


@torch.inference_mode()
def computed(network: Any, engine: Any, x: Tensor, conditions: dict[str, Any]) -> Tensor:
    """The engine's forward, without the network's own."""
    with patch.object(network, "forward", side_effect=AssertionError("The engine was not used.")):
        return engine(x, torch.full((len(x),), 0.7), **conditions)


@pytest.mark.parametrize(
    ("network_class", "config", "inputs"),
    [
        (StageC, UNUSUAL, stage_c_inputs(UNUSUAL)),
        (StageB, STAGE_B, stage_b_inputs(STAGE_B, size=(10, 14))),  # levels that do not divide the one above
    ],
    ids=["C", "B"],
)
def test_in_float32_it_changes_nothing(network_class, config, inputs):
    """The scale changes under an engine that has run before, and back."""
    x, conditions = inputs
    if network_class is StageC:
        conditions = {**conditions, "control": [torch.randn(2, config.c_hidden[0], 2, 3), None]}
    network = build(network_class, config)
    engine = Engine(network)
    whole = computed(network, engine, x, conditions)
    for scale in (STREAM_SCALE, 1.0):
        scale_residual_stream(network, scale)
        assert relative_error(computed(network, engine, x, conditions), whole) <= 1e-6


@pytest.fixture(scope="module")
def stage_c() -> Any:
    return overflowing.overflowing(StageC.from_config(overflowing.STAGE_C))


def halves(conditions: dict[str, Any]) -> dict[str, Any]:
    return {name: value.half() if isinstance(value, Tensor) else value for name, value in conditions.items()}


@pytest.mark.parametrize("changed", ["plain", "LoRA", "ControlNet"])
def test_stage_c_that_overflows(stage_c, changed):
    """It is compared with the network in float32, after whose growth fp16 as published holds nothing."""
    x, conditions = randn(1, 16, 7, 10), dict[str, Any](prompt(1))
    if changed == "ControlNet":
        conditions["control"] = residuals(stage_c)
        assert (
            max(residual.abs().max() for residual in conditions["control"] if residual is not None)
            > GROWTH / 10
        )
    patches = [lora(stage_c)] if changed == "LoRA" else []
    with torch.inference_mode(), patched(stage_c, patches):
        expected = stage_c(x, torch.tensor([0.7]), **conditions)
    network = in_fp16(stage_c, STREAM_SCALE)
    with patched(network, patches):
        out = computed(network, Engine(network), x.half(), halves(conditions))
    assert out.dtype == torch.float16
    assert relative_error(out.float(), expected) <= TRAJECTORY


def test_as_published_it_overflows(stage_c):
    network = in_fp16(stage_c, 1)
    out = computed(network, Engine(network), randn(1, 16, 7, 10).half(), halves(prompt(1)))
    assert not out.isfinite().all()


def test_stage_b_that_overflows():
    whole: Any = overflowing.overflowing(StageB.from_config(overflowing.STAGE_B))
    x, conditions = (
        randn(1, 4, 18, 22),
        {"effnet": randn(1, 16, 3, 3, seed=1), "clip": randn(1, 1, 64, seed=2)},
    )
    with torch.inference_mode():
        expected = whole(x, torch.tensor([0.7]), **conditions)
    network = in_fp16(whole, STREAM_SCALE)
    out = computed(network, Engine(network), x.half(), halves(conditions))
    assert relative_error(out.float(), expected) <= TRAJECTORY


@pytest.mark.parametrize("operations", ["fp8"], indirect=True)
def test_products_in_fp8(stage_c):
    """They are as near as for the same network in float32: rows are quantised by scales of their own."""
    x, conditions = randn(1, 16, 7, 10), prompt(1)
    with torch.inference_mode():
        expected = stage_c(x, torch.tensor([0.7]), **conditions)
    network = in_fp16(stage_c, STREAM_SCALE)
    in_float32 = computed(stage_c, Engine(quantise_network(stage_c, E4M3)), x, conditions)
    in_half = computed(network, Engine(quantise_network(network, E4M3)), x.half(), halves(conditions))
    assert relative_error(in_half.float(), expected) <= 1.25 * relative_error(in_float32, expected)
