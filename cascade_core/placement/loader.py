"""From where weights lie to the device: pinned memory in one copy, a file through a few pinned chunks."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.pages import forget_pages
from .device import Device
from .units import Unit

READERS = 4  # most disks give more to several readers than to one
CHUNK = 32 << 20  # bytes


class Arrival:
    """A copy to the device that was begun, or will be as soon as its weights have been read."""

    def __init__(self, device: Device, begun: Any | Future):
        self.device, self.begun = device, begun

    def wait(self) -> None:
        """What is computed from now on finds the weights there. Raises what went wrong while they were read."""
        self.device.wait(self.begun.result() if isinstance(self.begun, Future) else self.begun)


class Supply:
    """Brings units to one device."""

    def __init__(self, device: Device):
        self.device = device
        self.files: list[tuple[int, int]] = []  # mapped, whose pages may go once they were read

    @cached_property
    def _readers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(READERS, thread_name_prefix="weights")

    @cached_property
    def _chunks(self) -> SimpleQueue[tuple[Tensor, Any]]:
        """Pinned chunks, each with the mark at which it may be filled again."""
        chunks: SimpleQueue[tuple[Tensor, Any]] = SimpleQueue()
        for _ in range(READERS):
            pinned = self.device.pinned(CHUNK)
            with torch.inference_mode():
                chunks.put((torch.empty(CHUNK, dtype=torch.uint8) if pinned is None else pinned, None))
        return chunks

    @torch.inference_mode()
    def fetch(self, unit: Unit, target: Tensor, after: Any, often: bool) -> Arrival:
        """Begins to bring a unit's bytes to `target` once `after` is reached.

        often: it will be fetched again and again, so that pinning it pays at once; else it does the second time. Then
        its weights in main memory are the pinned ones, and the former ones are let go.
        """
        if unit.host is not None:
            return Arrival(self.device, self.device.copy(target, unit.host, after))
        pin, unit.fetched = often or unit.fetched, True
        chunks = self._chunks  # made here, by one thread
        return Arrival(self.device, self._readers.submit(self._read, unit, target, after, pin, chunks))

    @torch.inference_mode()
    def _read(self, unit: Unit, target: Tensor, after: Any, pin: bool, chunks: SimpleQueue) -> Any:
        host = self.device.pinned(unit.size) if pin else None
        if host is not None:
            unit.read(host)
            forget_pages(unit.home, self.files)
            unit.host, unit.home = host, unit.views(host)
            return self.device.copy(target, host, after)
        mark = None
        for start in range(0, unit.size, CHUNK):
            chunk, free = chunks.get()
            try:
                if free is not None:
                    self.device.synchronize(free)
                piece = chunk[: min(CHUNK, unit.size - start)]
                unit.read(piece, start)
                mark = self.device.copy(target[start : start + len(piece)], piece, after)
            finally:
                chunks.put((chunk, mark))
        forget_pages(unit.home, self.files)
        return mark
