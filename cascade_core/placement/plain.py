"""Placement without CUDA: networks are moved to the device whole, and off it again where memory is short."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from ..accelerators import free_bytes, trim
from ..adapters.apply import Patch, patched
from ..networks.precision import cast_dtype, dtype_on_device
from .device import out_of_memory
from .placement import WeightConsumer
from .shared import RunBytes

T = TypeVar("T")

ENDLESS = 2**62  # bytes, where the number of free ones is unknown


class PlainMemory:
    """The networks on a device that is not an NVIDIA card; has the methods of `DeviceMemory`. Not thread-safe.

    Weights are copied one by one, by PyTorch alone: nothing is pinned or streamed, and no weight is a view into a
    larger buffer, which Apple's backend gets wrong. The copies in main memory are kept, so that weights leave the
    device without a copy.

    limit: bytes that weights and runs may take at most; None: what is free
    """

    def __init__(self, device: torch.device, limit: int | None = None):
        self.device, self.limit = device, limit
        self._present: WeakKeyDictionary[nn.Module, _Present] = WeakKeyDictionary()

    def run(
        self,
        network: nn.Module,
        body: Callable[[torch.device], T],
        workspace_bytes: int = 0,
        patches: Sequence[Patch] = (),
        notify: Callable[[str], object] = lambda text: None,
        single_use: bool = False,
        consumer: WeightConsumer | None = None,
        known_bytes: RunBytes | None = None,
    ) -> T:
        """body(device) with the network on the device, patched; see `DeviceMemory.run`.

        Where memory runs out, the body is run again from its beginning with all other networks off the device.
        """
        try:
            return self._run(network, body, workspace_bytes, patches, consumer)
        except Exception as error:
            if not out_of_memory(error) or not self._others(network):
                raise
        # Only outside of the except block are the frames gone that referred to the run's tensors.
        self._evict(self._others(network))
        notify("out of memory; trying again with the other stages off the device.")
        return self._run(network, body, workspace_bytes, patches, consumer)

    def free_bytes(self, network: nn.Module, keep_others: bool = False) -> int:
        """Bytes left to a run beside the network's weights, if the others are evicted, or (keep_others) stay."""
        others = 0 if keep_others else sum(map(_bytes, self._others(network)))
        return self._free() + others - self._missing_bytes(network)

    def resident_share(self, network: nn.Module) -> float:
        """The share of a network's bytes that is on the device: all or none."""
        return float(network in self._present)

    def release(self) -> None:
        """Takes all networks off the device."""
        self._evict(list(self._present))

    def _run(
        self,
        network: nn.Module,
        body: Callable[[torch.device], T],
        workspace_bytes: int,
        patches: Sequence[Patch],
        consumer: WeightConsumer | None,
    ) -> T:
        for other in self._others(network):
            if self._missing_bytes(network) + workspace_bytes <= self._free():
                break
            self._evict([other])
        try:
            present = self._present.pop(network, None) or _Present(network)
            self._present[network] = present  # moves it to the end: it ran last
            present.onload(self.device)
        except BaseException:
            self._evict([network])
            raise
        if consumer is not None:
            present.consumers.add(consumer)
        present.in_use += 1
        try:
            with patched(network, patches):
                return body(self.device)
        finally:
            present.in_use -= 1

    def _others(self, network: nn.Module) -> list[nn.Module]:
        """Networks on the device that are not running, least recently used first."""
        present = list(self._present.items())
        return [other for other, where in present if other is not network and not where.in_use]

    def _free(self) -> int:
        free = free_bytes(self.device)
        if self.limit is not None:
            free = min(self.limit - sum(map(_bytes, self._present)), ENDLESS if free is None else free)
        return ENDLESS if free is None else free

    def _missing_bytes(self, network: nn.Module) -> int:
        return 0 if network in self._present else _bytes(network)

    def _evict(self, networks: Sequence[nn.Module]) -> None:
        for network in networks:
            present = self._present.pop(network, None)
            if present is not None:
                present.offload()
        trim(self.device)


class _Present:
    """A network on the device, with its weights' tensors in main memory."""

    def __init__(self, network: nn.Module):
        self.consumers: WeakSet[WeightConsumer] = WeakSet()
        self.in_use = 0  # runs
        self._moved = False
        self._dtype = cast_dtype(network)
        self._entries: list[tuple[dict[str, Any], str, torch.Tensor]] = [
            (tensors, name, tensor)
            for module in network.modules()
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if tensor is not None
        ]

    def onload(self, device: torch.device) -> None:
        if self._moved:
            return
        moved: dict[int, torch.Tensor] = {}  # a tensor may stand in several places
        with torch.no_grad():
            for tensors, name, tensor in self._entries:
                if id(tensor) not in moved:
                    stored = tensor.detach()
                    value = stored.to(dtype_on_device(stored.dtype, self._dtype)).to(device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    moved[id(tensor)] = nn.Parameter(value, requires_grad=False) if is_parameter else value
                tensors[name] = moved[id(tensor)]
        self._moved = True

    def offload(self) -> None:
        for consumer in self.consumers:
            consumer.offload()
        for tensors, name, tensor in self._entries:
            tensors[name] = tensor
        self._moved = False


def _bytes(network: nn.Module) -> int:
    """Bytes of its weights as they are on the device."""
    dtype = cast_dtype(network)
    tensors = (*network.parameters(), *network.buffers())
    return sum(tensor.numel() * dtype_on_device(tensor.dtype, dtype).itemsize for tensor in tensors)
