"""CUDA graphs: the launches of a forward, captured once and replayed, so that the GPU never waits for Python."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


def can_capture(device: torch.device) -> bool:
    """Whether graphs are safe: not with the allocator cudaMallocAsync, ComfyUI's default."""
    return device.type == "cuda" and torch.cuda.get_allocator_backend() == "native"


@contextmanager
def capture(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> Iterator[None]:
    """Captures the launches inside the block, with memory of the pool."""
    current = torch.cuda.stream(torch.cuda.current_stream(device))  # restores it, also where capture fails
    gc_enabled = gc.isenabled()
    gc.disable()  # collecting an old graph inside the block would end the capture
    try:
        # Other threads of a host may call the CUDA API meanwhile.
        with current, torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            yield
    finally:
        if gc_enabled:
            gc.enable()


class GraphPool:
    """Memory that a network's graphs share: only one of them runs at a time, and only its output outlives a replay.

    sizes: bytes by device that the allocator keeps for the pool, neither in use nor free for other tensors
    """

    def __init__(self) -> None:
        self.sizes: dict[torch.device, int] = {}

    @cached_property
    def handle(self) -> Any:
        return torch.cuda.graph_pool_handle()

    @contextmanager
    def growing(self, device: torch.device) -> Iterator[None]:
        """Counts the memory that the allocator takes inside the block, unless the block fails."""
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
        yield
        grown = torch.cuda.memory_reserved(device) - before
        self.sizes[device] = self.sizes.get(device, 0) + max(grown, 0)


class Graphed:
    """Runs a function eagerly the first time, captures it the second time, and replays it from then on.

    The eager run compiles kernels and allocates workspaces, which is impossible during capture.

    capture(function, *inputs): returns a function of the inputs that replays what it captured
    """

    def __init__(self, capture: Callable[..., Callable[..., Tensor]]):
        self._capture = capture
        self._replay: Callable[..., Tensor] | None = None
        self.warm = False

    def __call__(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        if not self.warm:
            return self.run_eagerly(function, *inputs)
        if self._replay is None:
            self._replay = self._capture(function, *inputs)
        return self._replay(*inputs)

    def run_eagerly(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        self.warm = True
        return function(*inputs)


class CapturedForward:
    """`forward(x)`, captured. Everything else that it reads must stay at the same addresses."""

    def __init__(self, pool: GraphPool, forward: Callable[[Tensor], Tensor], x: Tensor):
        self.graph, self.static_input = torch.cuda.CUDAGraph(), x.clone()
        with pool.growing(x.device), capture(self.graph, pool.handle, x.device):
            self.static_output = forward(self.static_input)

    def __call__(self, x: Tensor) -> Tensor:
        self.static_input.copy_(x)
        self.graph.replay()
        return self.static_output.clone()
