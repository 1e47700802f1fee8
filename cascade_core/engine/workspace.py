"""Memory of a forward's intermediate values: planned during the first forward, then one block at fixed addresses.

A CUDA graph keeps the addresses that it was captured with. What is allocated during a capture belongs to the graph;
cudaMallocAsync, ComfyUI's allocator, gives it addresses that Triton cannot use. So a captured forward allocates
nothing: all its memory is allocated before the capture, laid out by the requests of an eager forward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

ALIGNMENT = 256  # bytes, which suits every kernel and copy


class AllocatesError(RuntimeError):
    """A forward allocates memory outside its workspace, which a captured one must not."""


class _Memory(Protocol):
    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor: ...


_current: ContextVar[_Memory | None] = ContextVar("workspace", default=None)


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`like.new_empty(shape, dtype=dtype)`, out of the workspace inside `planning` and `within`."""
    memory, dtype = _current.get(), dtype or like.dtype
    if memory is None:
        return torch.empty(shape, dtype=dtype, device=like.device)
    return memory.take(shape, dtype, like.device)


@dataclass
class MemoryPlan:
    """Position of each memory request of a forward, in order.  size: bytes of the whole"""

    requests: list[tuple[int, int]] = field(default_factory=list)  # offset and bytes
    size: int = 0


class _Recorder:
    """Hands out new memory, and records the lowest offset free at that time as its place in the plan."""

    def __init__(self) -> None:
        self.plan = MemoryPlan()
        self._live: list[tuple[int, int, StorageWeakRef]] = []  # offset, end; by offset

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=device)
        size = aligned(tensor.nbytes)
        self._live = [entry for entry in self._live if not entry[2].expired()]
        ends = [0, *(end for _, end, _ in self._live)]
        starts = [*(start for start, _, _ in self._live), math.inf]
        place = next(
            i for i, (end, start) in enumerate(zip(ends, starts, strict=True)) if start - end >= size
        )
        self._live.insert(place, (ends[place], ends[place] + size, StorageWeakRef(tensor.untyped_storage())))
        self.plan.requests.append((ends[place], tensor.nbytes))
        self.plan.size = max(self.plan.size, ends[place] + size)
        return tensor


class _Planned:
    """Hands out the places of a plan in `memory`."""

    def __init__(self, plan: MemoryPlan, memory: Tensor):
        self.memory, self.requests = memory, iter(plan.requests)

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        offset, size = next(self.requests, (0, -1))
        if size != math.prod(shape) * dtype.itemsize or device != self.memory.device:
            raise AllocatesError("A forward asks for other memory than the first time.")
        return self.memory[offset : offset + size].view(dtype).view(*shape)


@contextmanager
def planning() -> Iterator[MemoryPlan]:
    """Records the memory requests of the forward inside the block; the plan is complete at its end."""
    recorder = _Recorder()
    token = _current.set(recorder)
    try:
        yield recorder.plan
    finally:
        _current.reset(token)


@contextmanager
def within(plan: MemoryPlan, memory: Tensor) -> Iterator[None]:
    """The same forward again, in `memory` (at least `plan.size` bytes)."""
    token = _current.set(_Planned(plan, memory))
    try:
        yield
    finally:
        _current.reset(token)


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
