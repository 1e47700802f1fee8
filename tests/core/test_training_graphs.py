"""Training steps whose CUDA graphs cannot be captured, as on a machine that has no CUDA: they go on without."""

import logging

import torch
from torch import nn

from cascade_nodes.cascade_core.training.cuda_graphs import GraphedFunction


def test_a_capture_that_fails_ends_no_training(caplog):
    layer = nn.Linear(3, 2)
    calls: list[tuple[int, ...]] = []

    def forward(x, weight, bias):
        calls.append(tuple(x.shape))
        return nn.functional.linear(x, weight, bias)

    graphed = GraphedFunction(forward)
    inputs = [torch.randn(size, 3, generator=torch.Generator().manual_seed(size)) for size in (1, 1, 1, 2, 2)]
    with caplog.at_level(logging.WARNING):
        for x in inputs:
            output = graphed(x, layer.weight, layer.bias)
            gradients = torch.autograd.grad(output.square().sum(), [layer.weight, layer.bias])
            expected = layer(x)
            assert torch.equal(output, expected)
            for ours, theirs in zip(
                gradients,
                torch.autograd.grad(expected.square().sum(), [layer.weight, layer.bias]),
                strict=True,
            ):
                assert torch.equal(ours, theirs)
    assert calls == [tuple(x.shape) for x in inputs]
    (record,) = caplog.records
    assert record.getMessage().startswith("No CUDA graph could be captured (")
    assert record.getMessage().endswith("): training steps take longer.")
