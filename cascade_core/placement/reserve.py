"""Memory that CUDA's allocator keeps for one purpose, such as graphs: neither in use nor free for anything else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

import torch

_RESERVES: WeakSet[Reserve] = WeakSet()


class Reserve:
    """Counted for as long as it lives."""

    def __init__(self) -> None:
        self.sizes: dict[torch.device, int] = {}  # bytes
        _RESERVES.add(self)

    @contextmanager
    def growing(self, device: torch.device) -> Iterator[None]:
        """What the allocator takes inside the block is this reserve's, unless the block fails."""
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
        yield
        grown = torch.cuda.memory_reserved(device) - before
        self.sizes[device] = self.sizes.get(device, 0) + max(grown, 0)


def reserved(device: torch.device) -> int:
    """Bytes of all reserves on the device."""
    return sum(reserve.sizes.get(device, 0) for reserve in _RESERVES)
