"""CUDA graphs of a network's forward and backward passes: a step then waits for the accelerator and not for Python.

A step on the published Stage C launches thousands of kernels, most of them shorter than it takes to launch them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..engine.graphs import capture
from ..engine.lru import LRU

MOST = 12  # shapes whose passes are kept; a bucket of another aspect ratio is another shape


class GraphedFunction:
    """`function` of tensors, its passes recorded the second time that a shape is seen, and replayed from then on.

    It gives one tensor, reads nothing that changes but its arguments, and draws nothing at random. Parameters among
    them are read where they lie; of anything else there is a copy.

    All shapes share the memory of the largest, so no pass may begin between another and its way back: such a one runs
    as it is.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.function = function
        self.passes: LRU[list[Passes]] = LRU(MOST)  # none the first time
        self.pool: Any = None
        self.returning = False

    def __call__(self, *inputs: Tensor) -> Tensor:
        gradients = torch.is_grad_enabled()
        key = gradients, *((tuple(value.shape), value.dtype, value.requires_grad) for value in inputs)
        seen = key in self.passes
        kept = self.passes.get_or_create(key, list)
        if not seen or self.returning:  # kernels are compiled and workspaces allocated the first time
            return self.function(*inputs)
        if not kept:
            kept.append(self._record(inputs, gradients))
        return _Replay.apply(self, kept[0], *inputs)  # type: ignore[return-value]

    def _record(self, inputs: Sequence[Tensor], gradients: bool) -> Passes:
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()  # what the pass took that was not recorded
        return Passes(self.function, inputs, self.pool, gradients)


class Passes:
    """One shape's passes. Their arguments and results lie at fixed addresses."""

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor], pool: Any, gradients: bool):
        # Not the parameters themselves: autograd would bring their gradients to the stream of passes before.
        self.inputs = [_still(value).requires_grad_(value.requires_grad) for value in inputs]
        device = self.inputs[0].device
        self.wanted = [gradients and value.requires_grad for value in inputs]
        self.forward, self.backward = torch.cuda.CUDAGraph(), None
        with torch.set_grad_enabled(gradients), capture(self.forward, pool, device):
            output = function(*self.inputs)
        self.output, self.gradients = output.detach(), ()
        if any(self.wanted):
            self.backward, self.incoming = torch.cuda.CUDAGraph(), torch.empty_like(self.output)
            sources = [value for value, wanted in zip(self.inputs, self.wanted, strict=True) if wanted]
            with capture(self.backward, pool, device):
                self.gradients = torch.autograd.grad(output, sources, self.incoming, allow_unused=True)

    def forwards(self, inputs: Sequence[Tensor]) -> Tensor:
        for kept, value in zip(self.inputs, inputs, strict=True):
            if kept.data_ptr() != value.data_ptr():  # a parameter lies where it lay
                kept.detach().copy_(value)
        self.forward.replay()
        return self.output.clone()

    def backwards(self, incoming: Tensor) -> list[Tensor | None]:
        assert self.backward is not None
        self.incoming.copy_(incoming)
        self.backward.replay()
        given = iter(self.gradients)
        found = [next(given) if wanted else None for wanted in self.wanted]
        return [None if gradient is None else gradient.clone() for gradient in found]


def _still(value: Tensor) -> Tensor:
    return value.detach() if isinstance(value, nn.Parameter) else value.detach().clone()


class _Replay(torch.autograd.Function):
    """The passes as one operation of autograd's."""

    @staticmethod
    def forward(ctx: Any, recorded: GraphedFunction, passes: Passes, *tensors: Tensor) -> Tensor:
        ctx.recorded, ctx.passes = recorded, passes
        recorded.returning = passes.backward is not None
        return passes.forwards(tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *incoming: Tensor):
        ctx.recorded.returning = False
        return None, None, *ctx.passes.backwards(incoming[0])
