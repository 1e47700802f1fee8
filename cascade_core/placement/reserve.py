"""Memory that CUDA's allocator keeps for one purpose, such as graphs: neither in use nor free for anything else."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

_RESERVES: weakref.WeakSet[Reserve] = weakref.WeakSet()


class Reserve:
    """Counted for as long as it lives, as the network's that it is for."""

    def __init__(self, network: nn.Module) -> None:
        self.network = weakref.ref(network)
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


def reserved(device: torch.device, network: nn.Module | None = None) -> int:
    """Bytes of all reserves on the device, or of a network's."""
    found = [reserve for reserve in _RESERVES if network is None or reserve.network() is network]
    return sum(reserve.sizes.get(device, 0) for reserve in found)
