"""CUDA graphs: the launches of a forward recorded once and replayed, so that the GPU never waits for Python."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


def can_record(device: torch.device) -> bool:
    """Whether graphs can be trusted: not where memory comes from cudaMallocAsync, as ComfyUI sets it up by default."""
    return device.type == "cuda" and torch.cuda.get_allocator_backend() == "native"


@contextmanager
def capture(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> Iterator[None]:
    """What is launched inside the block goes into the graph, in memory of the pool."""
    own = torch.cuda.stream(torch.cuda.current_stream(device))  # to be back on, also where recording fails
    collects = gc.isenabled()
    gc.disable()  # an old graph that was collected inside the block would end the recording
    try:
        # Other threads of a host may ask the device something meanwhile.
        with own, torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            yield
    finally:
        if collects:
            gc.enable()


class Pool:
    """Memory that a network's graphs share: only one of them runs at a time, and none keeps anything but its output.

    sizes: bytes by device that the allocator keeps for it, neither in use nor free for anything else.
    """

    def __init__(self) -> None:
        self.sizes: dict[torch.device, int] = {}

    @cached_property
    def handle(self) -> Any:
        return torch.cuda.graph_pool_handle()

    @contextmanager
    def growing(self, device: torch.device) -> Iterator[None]:
        """Counts what the allocator takes inside the block, unless the block fails."""
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
        yield
        grown = torch.cuda.memory_reserved(device) - before
        self.sizes[device] = self.sizes.get(device, 0) + max(grown, 0)


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
        with self._pool.growing(x.device), capture(graph, self._pool.handle, x.device):
            out = forward(still)
        return graph, still, out
