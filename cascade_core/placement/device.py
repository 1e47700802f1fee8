"""Interface of a device for placement: memory, copies that overlap computation, and events to order them.

All memory is allocated in inference mode: parameters that were made in that mode can share no other memory, while
those made outside of it can share both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from ..accelerators import side_stream
from .pinned import pinned_pages

MARGIN = 0.03  # share of the memory that the allocator loses to fragmentation
WORKSPACE = 64 << 20  # bytes: of the matrix libraries
KERNELS = 256 << 20  # bytes that CUDA loads over time outside of PyTorch's memory, above all kernels
MESSAGES = (  # of errors that mean out of memory, beside torch.OutOfMemoryError
    "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory", "HIPBLAS_STATUS_ALLOC_FAILED", "HIP error: out of memory",
    "MPS backend out of memory", "UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY", "not enough GPU video memory",
)  # fmt: skip
FRACTION = "get_per_process_memory_fraction"  # of torch.cuda from torch 2.8 on
SEGMENT = 2 << 20  # bytes: PyTorch's allocator takes large blocks in multiples of this


class Device(Protocol):
    """A device on which one stream computes and another copies. An event is a point in either stream."""

    device: torch.device

    def limited(self) -> AbstractContextManager[None]:
        """Limits this process's memory on the device, inside the block, to the limit that the device was made with."""
        ...

    def budget(self, resident_bytes: int) -> int:
        """Bytes for weights, CUDA graphs and runs, including resident_bytes, those of weights already on the device."""
        ...

    def footprint(self, size: int) -> int:
        """Bytes that an allocation of `size` bytes takes."""
        ...

    def empty(self, size: int) -> Tensor:
        """(size,) uint8 on the device. Raises torch.OutOfMemoryError."""
        ...

    def pinned(self, size: int) -> Tensor | None:
        """(size,) uint8 in pinned memory; None where main memory is short."""
        ...

    def record_event(self) -> Any:
        """An event at the end of all computation launched so far."""
        ...

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Starts a copy that waits for the event `after`; returns the event of its end. Callable from any thread."""
        ...

    def wait(self, event: Any) -> None:
        """Makes computation launched from now on wait for the event."""
        ...

    def synchronize(self, event: Any) -> None:
        """Waits for the event."""
        ...

    def trim(self) -> None:
        """Makes freed memory available to allocations of any size."""
        ...


class CudaDevice:
    """A CUDA device. limit: most bytes of it that this process may use during a run; None: all."""

    def __init__(self, device: torch.device, limit: int | None = None):
        self.device = device
        self.copies = side_stream(device)
        self.limit = limit
        self._is_limited = False

    @contextmanager
    def limited(self) -> Iterator[None]:
        unknown = not hasattr(torch.cuda, FRACTION)  # the previous limit could not be restored
        if self._is_limited or (self.limit is None and unknown):
            yield
            return
        # Only during a run, so that other code in this process keeps its own limit. Without a limit, PyTorch would
        # keep freed memory until the card is full, and there would be no room to load the next kernel.
        fraction = self._memory_fraction()
        most, total = self._most_bytes()
        torch.cuda.set_per_process_memory_fraction(min(most / total, fraction), self.device)
        self._is_limited = True
        try:
            yield
        finally:
            self._is_limited = False
            torch.cuda.set_per_process_memory_fraction(fraction, self.device)

    def _memory_fraction(self) -> float:
        query = getattr(torch.cuda, FRACTION, None)
        return 1.0 if query is None else query(self.device)

    def _most_bytes(self) -> tuple[int, int]:
        """Bytes that PyTorch may reserve in this process, by the limit and the free memory; the card's bytes."""
        free, total = torch.cuda.mem_get_info(self.device)
        most = max(free + torch.cuda.memory_reserved(self.device) - KERNELS, 0)
        return most if self.limit is None else min(most, self.limit), total

    def budget(self, resident_bytes: int) -> int:
        most, total = self._most_bytes()
        usable = min(most, int(self._memory_fraction() * total))
        other_bytes = max(torch.cuda.memory_allocated(self.device) - resident_bytes, 0)
        return int(usable * (1 - MARGIN)) - WORKSPACE - other_bytes

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
        except (TypeError, ValueError):  # an error code that torch does not know
            pass
        # Clears CUDA's last error, which the next kernel would report as its own.
        with suppress(RuntimeError):
            torch.zeros(1, device=self.device)
        return False

    def _unpin(self, address: int) -> None:
        runtime: Any = torch.cuda.cudart()
        with suppress(Exception):  # when the process ends the device may be gone
            torch.cuda.synchronize(self.device)  # no copy may read memory while it is unpinned
            runtime.cudaHostUnregister(address)

    def record_event(self) -> torch.cuda.Event:
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

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def synchronize(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def trim(self) -> None:
        torch.cuda.empty_cache()


class SimulatedDevice:
    """A device of `size` bytes simulated in main memory, where copies are synchronous, for testing placements."""

    def __init__(self, size: int):
        self.device = torch.device("cpu")
        self.size = size

    def limited(self) -> AbstractContextManager[None]:
        return nullcontext()

    def budget(self, resident_bytes: int) -> int:
        return self.size

    def footprint(self, size: int) -> int:
        return size

    def empty(self, size: int) -> Tensor:
        with torch.inference_mode():
            return torch.empty(size, dtype=torch.uint8)

    def pinned(self, size: int) -> Tensor | None:
        return pinned_pages(size, lambda address, length: False, lambda address: None)

    def record_event(self) -> Any:
        return None

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        target.copy_(source)

    def wait(self, event: Any) -> None:
        pass

    def synchronize(self, event: Any) -> None:
        pass

    def trim(self) -> None:
        pass


def out_of_memory(error: BaseException) -> bool:
    """Whether the device ran out of memory: torch's error, a library's RuntimeError, or one raised because of these."""
    return (
        isinstance(error, torch.OutOfMemoryError)
        or (isinstance(error, RuntimeError) and any(message in str(error) for message in MESSAGES))
        or (error.__context__ is not None and out_of_memory(error.__context__))
    )
