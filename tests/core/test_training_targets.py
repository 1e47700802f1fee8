"""What is trained, and around which frozen weights."""

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cascade_nodes.cascade_core import CascadeError, StageC
from cascade_nodes.cascade_core.networks.quantisation import INT8, quantise_network
from cascade_nodes.cascade_core.training.checks import check_networks
from cascade_nodes.cascade_core.training.frozen import NF4Linear, float_weight, quantise_to_nf4
from cascade_nodes.cascade_core.training.tasks.low_rank import matrix_size
from cascade_nodes.tests.core.training_runs import settings_of, write_world
from cascade_nodes.tests.golden_weights import relative_error
from cascade_nodes.tests.nodes.tiny import CONFIGS


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def frozen_layer(base: str) -> nn.Linear:
    """A layer of a tiny Stage C, whose weight is held in `base`; the same each time."""
    torch.manual_seed(0)
    network = StageC.from_config(CONFIGS["stage_c"]).requires_grad_(False)
    if base == "int8":
        quantise_network(network, INT8)
    elif base == "nf4":
        quantise_to_nf4(network, torch.device("cpu"))
    layer = network.get_submodule("down_blocks.0.0.channelwise.0")
    assert isinstance(layer, nn.Linear)
    return layer


@pytest.mark.parametrize(("base", "error"), [("int8", 0.02), ("nf4", 0.2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_goes_through_the_dequantised_weight_and_no_copy_is_kept(base, error, dtype):
    layer, plain = frozen_layer(base), frozen_layer("full")
    x = torch.randn(3, layer.in_features, dtype=dtype, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        y = layer(x)
    gradient = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, gradient)
    weight = float_weight(layer).to(dtype)
    assert torch.equal(found, gradient @ weight)
    assert not kept
    assert 0 < relative_error(float_weight(layer), plain.weight.detach()) < error
    with torch.no_grad():
        assert torch.equal(
            layer(x), F.linear(x, weight, None if layer.bias is None else layer.bias.to(dtype))
        )
    assert matrix_size(layer) == tuple(plain.weight.shape)


def test_four_bits_are_a_quarter_of_sixteen():
    layer = frozen_layer("nf4")
    assert isinstance(layer, NF4Linear)
    assert layer.weight.nbytes * 4 == layer.in_features * layer.out_features * 2


def test_what_is_trained_itself_is_not_quantised(world, tmp_path):
    with pytest.raises(
        CascadeError, match="base_weights is int8, but finetune trains those weights themselves"
    ):
        settings_of(world, "finetune", tmp_path, train={"base_weights": "int8"})


def test_nf4_without_its_package_is_told_before_anything_is_loaded(world, tmp_path, monkeypatch):
    settings = settings_of(world, "lora over nf4", tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(CascadeError, match="pip install bitsandbytes, or choose int8"):
        check_networks(settings, [])
