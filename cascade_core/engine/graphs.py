"""CUDA graphs: the launches of a forward recorded once and replayed, so that the GPU never waits for Python."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..placement.reserve import Reserve


def can_record(device: torch.device) -> bool:
    """Whether graphs can be trusted: not where memory comes from cudaMallocAsync, as ComfyUI sets it up by default."""
    return device.type == "cuda" and torch.cuda.get_allocator_backend() == "native"


class Pool(Reserve):
    """Memory that a network's graphs share: only one of them runs at a time, and none keeps anything but its output."""

    @cached_property
    def handle(self) -> Any:
        return torch.cuda.graph_pool_handle()


class Graph:
    """`graph(forward, x)` is `forward(x)`, recorded on the first call and replayed on the others.

    Everything that `forward` reads beside x must lie at the same addresses at every call. It must have run on this
    shape before, so that kernels are compiled and workspaces allocated.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._recorded: tuple[torch.cuda.CUDAGraph, Tensor, Tensor] | None = None

    def __call__(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self._recorded is None:
            self._recorded = self._record(forward, x)
        graph, still, out = self._recorded
        still.copy_(x)
        graph.replay()
        return out.clone()

    def _record(
        self, forward: Callable[[Tensor], Tensor], x: Tensor
    ) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        still = x.clone()
        graph = torch.cuda.CUDAGraph()
        # Other threads of a host may ask the device something meanwhile.
        recording = torch.cuda.graph(graph, pool=self._pool.handle, capture_error_mode="thread_local")
        own = torch.cuda.stream(
            torch.cuda.current_stream(x.device)
        )  # to be back on, also where recording fails
        with own, self._pool.growing(x.device), recording:
            out = forward(still)
        return graph, still, out
