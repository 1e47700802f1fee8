"""Stage B and C on a card in fp16, their residual stream held as a fraction: the kernels compiled, graphs captured.

With both allocators, as test_workspace.py says.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

from cascade_nodes.cascade_core import StageB, StageC
from cascade_nodes.cascade_core.engine import Engine, cublas, graphs
from cascade_nodes.cascade_core.engine import engine as engine_module
from cascade_nodes.cascade_core.networks.config import StageBConfig, StageCConfig
from cascade_nodes.cascade_core.networks.fp16 import STREAM_SCALE, scale_residual_stream
from cascade_nodes.tests.core import overflowing
from cascade_nodes.tests.engine.test_engine import UNUSUAL
from cascade_nodes.tests.gpu.compared import (
    LEVELS,
    OVER_EAGER,
    SENSIBLE,
    SHALLOW_B,
    SHALLOW_C,
    STAGE_B_700M,
    STAGE_C_1B,
    STAGE_C_3_6B,
    alone,
    assert_near,
    assert_small,
    draw,
    errors,
    inputs,
    network_of,
    noise,
    runs,
    same_bits,
)
from cascade_nodes.tests.gpu.conftest import Replays
from cascade_nodes.tests.gpu.test_engine import kernels  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("kernels", "exact_arithmetic")

FORWARDS = {
    "C, 3.6B": (STAGE_C_3_6B, 1, (24, 24)),
    "C, 1B": (STAGE_C_1B, 2, (5, 7)),
    "C, unusual": (UNUSUAL, 2, (9, 11)),
    "B, 700M": (STAGE_B_700M, 1, (18, 46)),  # levels that do not divide the one above
}
WIDE_C = StageCConfig(blocks=((1, 1), (1, 1)))  # of the published widths
WIDE_B = StageBConfig(blocks=((1, 1, 1, 1), (1, 1, 1, 1)))


@pytest.mark.parametrize("case", FORWARDS.values(), ids=FORWARDS.keys())
def test_a_forward(case: Any, device: torch.device, replays: Replays):
    config, batch, size = case
    network = network_of(config, torch.float16, device)
    scale_residual_stream(network)
    assert_near(network, Engine(network), *inputs(config, network, batch, size))
    assert replays.count == len(LEVELS) - 1


@pytest.mark.parametrize(
    ("network_class", "config", "size"),
    [
        (StageC, StageCConfig.from_dict(overflowing.STAGE_C), (7, 10)),
        (StageB, StageBConfig.from_dict(overflowing.STAGE_B), (18, 22)),
        (StageC, WIDE_C, (24, 24)),
        (StageB, WIDE_B, (64, 64)),
    ],
    ids=["C, small", "B, small", "C, published widths", "B, published widths"],
)
def test_a_stream_past_the_end_of_fp16(
    network_class: Any, config: Any, size: tuple[int, int], device: torch.device, replays: Replays
):
    """It is as near to float32 as the network's own forward. Without the fraction nothing is left."""
    network = overflowing.overflowing(network_class(config)).to(device)
    x, conditions = inputs(config, network, size=size)
    with torch.inference_mode():
        expected = network(x, noise(x, 0.7), **conditions)
    network.half()
    engine = Engine(network)
    halves = {name: value.half() for name, value in conditions.items()}
    assert not runs(engine, x.half(), halves, 1)[0].isfinite().all()
    scale_residual_stream(network)
    (own,) = runs(network, x.half(), halves, 1)
    with alone(network):
        outputs = runs(engine, x.half(), halves)
    assert replays.count == 2
    assert same_bits(outputs[1:2], outputs[2:])
    own_error, *engine_errors = ((out.float() - expected).norm() for out in (own, *outputs))
    assert max(engine_errors) <= OVER_EAGER * own_error
    assert own_error <= SENSIBLE * expected.norm()


def test_controlnets_and_the_way_back(device: torch.device):
    network = network_of(SHALLOW_C, torch.float16, device)
    published, engine = deepcopy(network), Engine(network)
    x, conditions = inputs(SHALLOW_C, network)
    conditions["control"] = [draw((2, 128, 4, 5), x), None, draw((2, 128, 9, 11), x)]
    scale_residual_stream(network)
    assert_near(network, engine, x, conditions)
    scale_residual_stream(network, 1)
    assert same_bits(runs(engine, x, conditions), runs(Engine(published), x, conditions))


@pytest.mark.parametrize("scale", [1.0, STREAM_SCALE])
@pytest.mark.parametrize(
    ("config", "size"),
    [(STAGE_C_3_6B, (24, 24)), (UNUSUAL, (9, 11)), (SHALLOW_B, (34, 50))],
    ids=["C", "unusual", "B"],
)
def test_as_before_ampere(
    config: Any,
    size: tuple[int, int],
    scale: float,
    device: torch.device,
    replays: Replays,
    monkeypatch: pytest.MonkeyPatch,
):
    """It computes by cuBLAS, PyTorch's attention and the kernels beside them, whatever this card can do."""
    monkeypatch.setattr(engine_module, "operations_on", lambda device, precision: cublas)
    network = network_of(config, torch.float16, device)
    scale_residual_stream(network, scale)
    engine = Engine(network)
    x, conditions = inputs(config, network, size=size)
    assert_small(errors(network, engine, x, conditions, kernel_attention=False), x.dtype)
    assert replays.count == (len(LEVELS) - 1 if graphs.can_allocate_in_capture(device) else 0)
    outputs = runs(engine, x, conditions)
    assert same_bits(outputs[1:], outputs[:1] * 2)


def test_stage_b_as_published(device: torch.device):
    """Hosts run it so in fp16: its stream stays within."""
    network = network_of(SHALLOW_B, torch.float16, device)
    assert_near(network, Engine(network), *inputs(SHALLOW_B, network, size=(34, 50)))
