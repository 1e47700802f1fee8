"""Copies weights to the device: pinned weights in one copy, weights of a mapped file through a few pinned chunks."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.pages import forget_pages
from .device import Device
from .units import Unit

READERS = 4  # threads: most disks deliver more to several readers than to one
CHUNK = 32 << 20  # bytes


class Transfer:
    """A copy to the device.

    event    of its end, or a future of that event while the weights are still being read
    changed  the unit's `changed` tensors that the copy includes
    """

    def __init__(self, device: Device, event: Any | Future, changed: Mapping[int, Tensor] | None = None):
        self.device, self.event, self.changed = device, event, changed or {}

    def wait(self) -> None:
        """Makes later computations wait for the copy. Raises the error, if any, of reading the weights."""
        self.device.wait(self.event.result() if isinstance(self.event, Future) else self.event)


class Loader:
    """Copies units to one device."""

    def __init__(self, device: Device):
        self.device = device
        self.mapped_files: list[tuple[int, int]] = []  # whose pages may be dropped after reading

    @cached_property
    def _readers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(READERS, thread_name_prefix="weights")

    @cached_property
    def _chunks(self) -> SimpleQueue[tuple[Tensor, Any]]:
        """Pinned chunks, each with the event after which it may be overwritten."""
        chunks: SimpleQueue[tuple[Tensor, Any]] = SimpleQueue()
        for _ in range(READERS):
            pinned = self.device.pinned(CHUNK)
            with torch.inference_mode():
                chunks.put((torch.empty(CHUNK, dtype=torch.uint8) if pinned is None else pinned, None))
        return chunks

    @torch.inference_mode()
    def fetch(self, unit: Unit, target: Tensor, after: Any, repeated: bool) -> Transfer:
        """Starts to copy a unit's bytes to `target`, after the event `after`.

        repeated: the unit will be fetched many times, so its weights are pinned at once; otherwise they are pinned at
        the second fetch. The pinned weights replace those that were in main memory before.
        """
        if unit.pinned is not None:
            event, changed = None, dict(unit.changed)
            for start, piece in unit.pieces(unit.pinned, changed):
                event = self.device.copy(target[start : start + len(piece)], piece, after)
            return Transfer(self.device, event, changed)
        pin, unit.fetched = repeated or unit.fetched, True
        chunks = self._chunks  # created here, since only one thread may
        return Transfer(self.device, self._readers.submit(self._read, unit, [target], after, pin, chunks))

    @torch.inference_mode()
    def _read(self, unit: Unit, targets: list[Tensor], after: Any, pin: bool, chunks: SimpleQueue) -> Any:
        """Copies the unit, and returns the event of the copy's end.

        targets: a list of the one target, which is taken out of it: a thread keeps its arguments for a moment after
        it has ended, and memory that seems in use then would put the next run into a smaller placement.
        """
        target = targets.pop()
        pinned = self.device.pinned(unit.size) if pin else None
        if pinned is not None:
            unit.read_bytes(pinned)
            forget_pages(unit.host_tensors, self.mapped_files)
            unit.pinned, unit.host_tensors = pinned, unit.views(pinned)
            return self.device.copy(target, pinned, after)
        event = None
        for start in range(0, unit.size, CHUNK):
            chunk, copied = chunks.get()
            try:
                if copied is not None:
                    self.device.synchronize(copied)
                piece = chunk[: min(CHUNK, unit.size - start)]
                unit.read_bytes(piece, start)
                event = self.device.copy(target[start : start + len(piece)], piece, after)
            finally:
                chunks.put((chunk, event))
        forget_pages(unit.host_tensors, self.mapped_files)
        return event
