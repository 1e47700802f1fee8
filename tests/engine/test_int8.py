"""Forwards with weights in int8: interpreted kernels, and the product that converts them, on the CPU."""

import pytest
import torch
from torch import Tensor

from cascade_nodes.cascade_core import StageB, StageC
from cascade_nodes.cascade_core.engine import Engine, int8
from cascade_nodes.cascade_core.engine import engine as engine_module
from cascade_nodes.cascade_core.engine.kernels import products
from cascade_nodes.cascade_core.engine.kernels.int8 import dequantise
from cascade_nodes.cascade_core.engine.kernels.tuned import Config
from cascade_nodes.cascade_core.networks.quantisation import E4M3, INT8, quantise, quantise_network
from cascade_nodes.tests.engine.test_engine import (
    STAGE_B,
    STAGE_C,
    build,
    stage_b_inputs,
    stage_c_inputs,
)
from cascade_nodes.tests.golden_weights import relative_error

CONFIG = Config(32, 32, 16)
WAYS = {
    "written in 16 bits": {},
    "converted in products": {"linear_int8": CONFIG, "add_linear_int8": CONFIG},
}


def round_weights(network) -> None:
    """The blocks' matrices, and the mappers between repeats, to int8 and back."""
    mappers = [list(level) for level in (*network.down_repeat_mappers, *network.up_repeat_mappers)]
    for block in network.modules():
        name = type(block).__name__
        if name in ("ResBlock", "FeedForwardBlock"):
            layers = [block.channelwise[0], block.channelwise[4]]
        elif name == "AttnBlock":
            attention = block.attention.attn
            layers = [attention.to_q, attention.to_k, attention.to_v, attention.out_proj]
        elif name == "Conv2d" and any(block in level for level in mappers):
            layers = [block]
        else:
            continue
        for layer in layers:
            weight8, scale = quantise(layer.weight, INT8)
            layer.weight.copy_((weight8.float() * scale[:, None]).view_as(layer.weight))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    ("network_class", "config", "inputs"),
    [(StageC, STAGE_C, stage_c_inputs), (StageB, STAGE_B, stage_b_inputs)],
)
def test_a_forward_is_that_of_the_rounded_weights(monkeypatch, network_class, config, inputs, way):
    monkeypatch.setattr(engine_module, "operations_on", lambda device, precision: int8)
    monkeypatch.setattr(products, "choose", lambda op, *_: way.get(op))
    network, rounded, (x, conditions) = (
        build(network_class, config),
        build(network_class, config),
        inputs(config),
    )
    noise = torch.full((len(x),), 0.7)
    with torch.inference_mode():
        exact = network(x, noise, **conditions)
        computed = Engine(quantise_network(network, INT8))(x, noise, **conditions)
        round_weights(rounded)
        expected = rounded(x, noise, **conditions)
    # Keys and values of the conditioning, computed once a run, come from the layers' own weights.
    assert relative_error(computed, exact) < 0.05
    assert relative_error(computed, expected) < 0.3 * relative_error(computed, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(48, 80), (5, 37), (33, 1040)], ids=str)
def test_dequantised(size, dtype):
    weight: Tensor = torch.randn(*size, generator=torch.Generator().manual_seed(0))
    for weight8, scale in (quantise(weight, INT8), quantise(weight, E4M3)):
        out = dequantise(weight8, scale, torch.empty(size, dtype=dtype))
        assert torch.equal(out, (weight8.float() * scale[:, None]).to(dtype))
