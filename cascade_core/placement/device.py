"""What placement asks of a device: memory, copies beside the computation, and marks in the order of things.

All memory is made in inference mode, because parameters that were made in it can lie in no other; those that were not
can lie in either.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .pinned import pinned_pages
from .reserve import reserved

MARGIN = 0.03  # of the memory, for what the allocator cannot use of it
WORKSPACE = 64 << 20  # bytes: the matrix libraries' own
SEGMENT = 2 << 20  # bytes: CUDA's allocator takes large blocks in multiples of this


class Device(Protocol):
    """A device on which one stream computes and another copies. A mark is a point in the one's or the other's work."""

    device: torch.device

    def budget(self, ours: int) -> int:
        """Bytes for weights and what a forward takes, where `ours` are weights that are there already."""
        ...

    def held(self, network: nn.Module) -> int:
        """Bytes that graphs of a network hold, which `budget` counts as taken."""
        ...

    def footprint(self, size: int) -> int:
        """Bytes that `size` of them take."""
        ...

    def empty(self, size: int) -> Tensor:
        """(size,) uint8 on the device. Raises torch.OutOfMemoryError."""
        ...

    def pinned(self, size: int) -> Tensor | None:
        """(size,) uint8 in main memory that the device reads by itself; None where that is short."""
        ...

    def mark(self) -> Any:
        """What has been computed so far."""
        ...

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Begins to copy once `after` is reached; the mark of its end. Called from any thread."""
        ...

    def wait(self, mark: Any) -> None:
        """What is computed from now on comes after the mark."""
        ...

    def synchronize(self, mark: Any) -> None:
        """Returns once the mark is reached."""
        ...

    def trim(self) -> None:
        """Memory that was let go can be had in pieces of any size."""
        ...


class Cuda:
    """A CUDA device. limit: bytes that this process may take of it at the most, None: all."""

    def __init__(self, device: torch.device, limit: int | None = None):
        self.device = device
        self.copies = torch.cuda.Stream(device)
        if limit is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(limit / total, self._fraction()), device)
        self.limit = limit

    def _fraction(self) -> float:
        asked = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # torch ≥ 2.8
        return 1.0 if asked is None else asked(self.device)

    def budget(self, ours: int) -> int:
        free, total = torch.cuda.mem_get_info(self.device)
        most = min(free + torch.cuda.memory_reserved(self.device), int(self._fraction() * total))
        if self.limit is not None:
            most = min(most, self.limit)
        others = max(torch.cuda.memory_allocated(self.device) - ours, 0)
        return int(most * (1 - MARGIN)) - WORKSPACE - others - reserved(self.device)

    def held(self, network: nn.Module) -> int:
        return reserved(self.device, network)

    def footprint(self, size: int) -> int:
        return size if size < SEGMENT // 2 else -(-size // SEGMENT) * SEGMENT

    def empty(self, size: int) -> Tensor:
        with torch.inference_mode():
            return torch.empty(size, dtype=torch.uint8, device=self.device)

    def pinned(self, size: int) -> Tensor | None:
        return pinned_pages(size, self._pin, self._unpin)

    def _pin(self, address: int, size: int) -> bool:
        runtime: Any = torch.cuda.cudart()
        try:
            if int(runtime.cudaHostRegister(address, size, 0)) == 0:
                return True
        except (TypeError, ValueError):  # a code that torch has no name for
            pass
        with suppress(
            RuntimeError
        ):  # CUDA's note of the failure, which the next kernel would take for its own
            torch.zeros(1, device=self.device)
        return False

    def _unpin(self, address: int) -> None:
        runtime: Any = torch.cuda.cudart()
        with suppress(Exception):  # at the end of the process the device may be gone
            torch.cuda.synchronize(self.device)  # no copy reads what goes
            runtime.cudaHostUnregister(address)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def copy(self, target: Tensor, source: Tensor, after: Any) -> torch.cuda.Event:
        with torch.cuda.stream(self.copies):
            if after is not None:
                self.copies.wait_event(after)
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self.copies)
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)

    def synchronize(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()

    def trim(self) -> None:
        torch.cuda.empty_cache()


class MainMemory:
    """Main memory in a device's place, of so many bytes, where everything happens at once: for trying placements."""

    def __init__(self, size: int):
        self.device = torch.device("cpu")
        self.size = size

    def budget(self, ours: int) -> int:
        return self.size

    def held(self, network: nn.Module) -> int:
        return 0

    def footprint(self, size: int) -> int:
        return size

    def empty(self, size: int) -> Tensor:
        with torch.inference_mode():
            return torch.empty(size, dtype=torch.uint8)

    def pinned(self, size: int) -> Tensor | None:
        return pinned_pages(size, lambda address, length: False, lambda address: None)

    def mark(self) -> Any:
        return None

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        target.copy_(source)

    def wait(self, mark: Any) -> None:
        pass

    def synchronize(self, mark: Any) -> None:
        pass

    def trim(self) -> None:
        pass


def out_of_memory(error: BaseException) -> bool:
    """Whether the device ran out of memory: torch's own error, a library's in a RuntimeError, or what came of it."""
    words = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
    return (
        isinstance(error, torch.OutOfMemoryError)
        or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))
        or (error.__context__ is not None and out_of_memory(error.__context__))
    )
