"""The backward pass of frozen depthwise convolutions against PyTorch's own."""

import pytest
import torch
from torch import nn

from cascade_nodes.cascade_core.training.depthwise import FrozenDepthwise, ready_depthwise


@pytest.mark.parametrize("side", [1, 3, 5])
def test_gradient_is_that_of_the_convolution(side):
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 6, side, padding=side // 2, groups=6, dtype=torch.float64).requires_grad_(False)
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    (expected,) = torch.autograd.grad(layer(x), x, upstream)
    out = FrozenDepthwise.apply(x, layer.weight, layer.bias)
    (found,) = torch.autograd.grad(out, x, upstream)
    assert out.equal(layer(x))
    assert (found - expected).abs().max() <= 1e-12


def test_only_frozen_depthwise_convolutions_are_changed():
    depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    network = nn.Sequential(depthwise, nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=2))
    ready_depthwise(network)
    assert not any("forward" in layer.__dict__ for layer in network)  # all are trained
    network.requires_grad_(False)
    ready_depthwise(network)
    assert ["forward" in layer.__dict__ for layer in network] == [True, False, False]
