"""A loss and its gradients as one CUDA graph for each shape of its inputs, so that a step never waits for Python.

The demo's networks are so small that Python launches a step's kernels more slowly than a GPU runs them.
"""

import gc
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cascade_nodes.cascade_core.accelerators import capture_stream
from cascade_nodes.cascade_core.engine.fallback import reason_of, still_computes
from cascade_nodes.cascade_core.engine.graphs import (
    can_allocate_in_capture,
    capture,
    on_stream,
)

logger = logging.getLogger(__name__)

Terms = dict[str, Tensor]
Loss = Callable[..., Terms]
WARM_UPS = 2  # before a capture: they compile kernels and choose convolutions


class CapturedLoss:
    """`loss(*inputs)` with its backward pass already run: the gradients are in the parameters' `grad`.

    loss: returns scalars by name, of which `loss` is minimised. It must not draw random numbers, nor synchronise, nor
    read changing values other than its inputs, the parameters and the buffers. Where nothing can be captured, it runs
    eagerly and its caller runs the backward pass, which after a captured one does nothing.
    """

    def __init__(self, loss: Loss, parameters: Iterable[Tensor]):
        self.loss, self.parameters = loss, list(parameters)
        self.eager = not can_allocate_in_capture(self.parameters[0].device)
        self._captured: dict[Any, _Captured] = {}
        self._gradients: list[Tensor] = []
        self._pool: Any = None

    def __call__(self, inputs: Sequence[Tensor], rare: bool = False) -> Terms:
        """rare: the shape is too rare to be worth compiling blocks for it."""
        if not self.eager:
            key = tuple((tuple(value.shape), value.dtype) for value in inputs)
            if key not in self._captured:
                self._capture(key, inputs, rare)
            if key in self._captured:
                return self._captured[key](inputs)
        with _uncompiled(rare):
            return self.loss(*inputs)

    def _capture(self, key: Any, inputs: Sequence[Tensor], rare: bool) -> None:
        device, started = self.parameters[0].device, time.monotonic()
        try:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
                self._gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
            with _uncompiled(rare):
                self._captured[key] = _Captured(
                    self.loss, self.parameters, self._gradients, inputs, self._pool
                )
            shapes = " ".join("×".join(map(str, value.shape)) for value in inputs)
            print(f"captured in {time.monotonic() - started:.0f} s: {shapes}", flush=True)
        except Exception as error:  # an error not of the capture recurs in the eager step
            self.eager = True
            still_computes(device)  # clears the error, which the next launch would report
            logger.warning(
                "No CUDA graph could be captured (%s): training steps take longer.", reason_of(error)
            )


class _Captured:
    """One shape's forward and backward pass. The arguments, terms and gradients are at fixed addresses."""

    def __init__(
        self,
        loss: Loss,
        parameters: list[Tensor],
        gradients: list[Tensor],
        inputs: Sequence[Tensor],
        pool: Any,
    ):
        device = parameters[0].device
        self.parameters = parameters
        self.static_inputs = [value.clone() for value in inputs]

        def run() -> tuple[Terms, Sequence[Tensor | None]]:
            terms = loss(*self.static_inputs)
            found = torch.autograd.grad(terms["loss"], parameters, allow_unused=True)
            return {name: value.detach() for name, value in terms.items()}, found

        # On the capture's own stream: autograd runs each node's backward where its forward ran.
        with on_stream(capture_stream(device)):
            for _ in range(WARM_UPS):
                run()
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # the memory of the warm-ups
        self.graph = torch.cuda.CUDAGraph()
        with capture(self.graph, device, pool):
            self.terms, found = run()
            # In the parameters' memory format, as fused optimisers need them, and one copy for all shapes.
            used = [(own, value) for own, value in zip(gradients, found, strict=True) if value is not None]
            torch._foreach_copy_([own for own, _ in used], [value for _, value in used])  # pyright: ignore[reportPrivateImportUsage]
        self.gradients = [None if value is None else own for own, value in zip(gradients, found, strict=True)]

    def __call__(self, inputs: Sequence[Tensor]) -> Terms:
        torch._foreach_copy_(self.static_inputs, list(inputs))  # pyright: ignore[reportPrivateImportUsage]
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        terms = {name: value.clone() for name, value in self.terms.items()}
        terms["loss"].requires_grad_()  # a leaf, so that a backward pass from it ends there
        return terms


@contextmanager
def _uncompiled(rare: bool) -> Iterator[None]:
    """Context in which compiled blocks run eagerly, if `rare`."""
    if not rare:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
