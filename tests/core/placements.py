"""Simulated devices that count what they allocate, run out of memory, and copy as late as they may."""

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from cascade_nodes.cascade_core.placement import SimulatedDevice


class Counting(SimulatedDevice):
    """Counts the bytes that are allocated on it, NaN until they are written; runs out of memory beyond `size`.

    failing: which of the next allocations fail nevertheless, counted from 0.
    """

    def __init__(self, size: int):
        super().__init__(size)
        self.now = self.peak = self.copied = 0
        self.failing: set[int] = set()
        self.lock = threading.Lock()  # copies are begun by several threads

    def empty(self, size: int) -> Tensor:
        fails = 0 in self.failing
        self.failing = {left - 1 for left in self.failing if left}
        if fails or self.now + size > self.size:
            raise torch.OutOfMemoryError(f"Tried to allocate {size} bytes.")
        with torch.inference_mode():
            memory = super().empty(size).fill_(255)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(memory.untyped_storage(), self._gone, size)
        return memory

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        with self.lock:
            self.copied += len(target)
        return super().copy(target, source, after)

    def _gone(self, size: int) -> None:
        self.now -= size


class Late(Counting):
    """Copies only when their event is waited for: code that forgets to wait reads what was there before."""

    def __init__(self, size: int):
        super().__init__(size)
        self.begun: list[tuple[Tensor, Tensor]] = []
        self.done = 0

    def copy(self, target: Tensor, source: Tensor, after: Any) -> int:
        with self.lock:
            self.begun.append((target, source))
            return len(self.begun)

    @torch.inference_mode()
    def wait(self, event: int) -> None:
        with self.lock:
            for target, source in self.begun[self.done : event]:
                target.copy_(source)
            self.begun[self.done : event] = [(torch.empty(0), torch.empty(0))] * max(event - self.done, 0)
            self.done = max(self.done, event)

    synchronize = wait
