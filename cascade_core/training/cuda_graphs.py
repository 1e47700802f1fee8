"""CUDA graphs of a network's forward and backward passes, so that a training step never waits for Python.

A step on the published Stage C launches thousands of kernels, most of them shorter than their launch takes on the CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..engine.fallback import reason_of, still_computes
from ..engine.graphs import capture
from ..engine.lru import LRU

logger = logging.getLogger(__name__)

SHAPES = 12  # input shapes whose graphs are kept; each bucket has its own


class GraphedFunction:
    """`function` of tensors: eager the first time that a shape is seen, captured the second time, then replayed.

    The function returns one tensor and reads no changing values beside its arguments. Parameters among the arguments
    are read in place; other arguments are copied. It may draw random numbers of the device's default generator, which
    is registered with every graph: a replay continues from the generator's seed and offset, as an eager pass does. It
    must not set that generator back.

    All shapes share the memory of the largest. A forward must not be replayed between another forward and its
    backward; such calls run eagerly, and all do once a capture has failed.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.function = function
        self.awaits_backward = False
        self._graphs: LRU[_Shape] = LRU(SHAPES)
        self._pool: Any = None
        self._eager = False

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self._eager:
            return self.function(*inputs)
        gradients = torch.is_grad_enabled()
        key = gradients, *((tuple(value.shape), value.dtype, value.requires_grad) for value in inputs)
        shape = self._graphs.get_or_create(key, _Shape)
        if self.awaits_backward or not shape.seen:
            shape.seen = True  # the eager pass compiles kernels and allocates workspaces
            return self.function(*inputs)
        if shape.passes is None:
            shape.passes = self._capture(inputs)
        if shape.passes is None:
            self._eager = True
            return self.function(*inputs)
        return _Replay.apply(self, shape.passes, *inputs)  # type: ignore[return-value]

    def _capture(self, inputs: Sequence[Tensor]) -> CapturedPasses | None:
        try:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            torch.cuda.empty_cache()  # frees the memory of the eager pass
            return CapturedPasses(self.function, inputs, self._pool)
        except Exception as error:  # an error not of the capture recurs in the eager pass
            still_computes(inputs[0].device)  # clears the error, which the next launch would report
            logger.warning(
                "No CUDA graph could be captured (%s): training steps take longer.", reason_of(error)
            )
        return None


class _Shape:
    """State of one input shape: whether it was seen, and its captured passes."""

    seen = False
    passes: CapturedPasses | None = None


class CapturedPasses:
    """One shape's forward and backward. Their arguments and results are at fixed addresses."""

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor], pool: Any):
        gradients = torch.is_grad_enabled()
        # Not the parameters themselves: autograd would accumulate their gradients on the stream of eager passes.
        self.static_inputs = [_static_input(value).requires_grad_(value.requires_grad) for value in inputs]
        device = self.static_inputs[0].device
        self.needs_gradient = [gradients and value.requires_grad for value in inputs]
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), None
        with torch.set_grad_enabled(gradients), capture(self.forward_graph, device, pool):
            output = function(*self.static_inputs)
        self.static_output, self.static_gradients = output.detach(), ()
        if any(self.needs_gradient):
            self.backward_graph = torch.cuda.CUDAGraph()
            self.static_output_gradient = torch.empty_like(self.static_output)
            pairs = zip(self.static_inputs, self.needs_gradient, strict=True)
            sources = [value for value, needed in pairs if needed]
            with capture(self.backward_graph, device, pool):
                self.static_gradients = torch.autograd.grad(
                    output, sources, self.static_output_gradient, allow_unused=True
                )

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        for static, value in zip(self.static_inputs, inputs, strict=True):
            if static.data_ptr() != value.data_ptr():  # a parameter is its own static input
                static.detach().copy_(value)
        self.forward_graph.replay()
        return self.static_output.clone()

    def backward(self, output_gradient: Tensor) -> list[Tensor | None]:
        """The gradients of the inputs; None for those that need none."""
        assert self.backward_graph is not None
        self.static_output_gradient.copy_(output_gradient)
        self.backward_graph.replay()
        static = iter(self.static_gradients)
        gradients = [next(static) if needed else None for needed in self.needs_gradient]
        return [None if gradient is None else gradient.clone() for gradient in gradients]


def _static_input(value: Tensor) -> Tensor:
    return value.detach() if isinstance(value, nn.Parameter) else value.detach().clone()


class _Replay(torch.autograd.Function):
    """Captured passes as one operation of autograd."""

    @staticmethod
    def forward(ctx: Any, function: GraphedFunction, passes: CapturedPasses, *inputs: Tensor) -> Tensor:
        ctx.function, ctx.passes = function, passes
        function.awaits_backward = passes.backward_graph is not None
        return passes.forward(inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *output_gradients: Tensor):
        ctx.function.awaits_backward = False
        return None, None, *ctx.passes.backward(output_gradients[0])
