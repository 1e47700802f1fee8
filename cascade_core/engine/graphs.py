"""CUDA graphs: the launches of a forward, captured once and replayed, so that the GPU never waits for Python."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from ..accelerators import capture_stream, is_nvidia
from ..placement import out_of_memory
from ..placement.shared import SharedWorkspaces
from . import workspace
from .collector import collector_paused
from .fallback import reason_of, still_computes
from .workspace import AllocatesError

logger = logging.getLogger(__name__)

_CAPTURING = threading.Lock()  # cudaMallocAsync supports one capture at a time in a process
REHEARSALS = 2  # the first call on a stream allocates cuBLAS's workspace, which stays


def can_capture(device: torch.device) -> bool:
    """Whether forwards that allocate nothing can be captured: on every NVIDIA card."""
    return is_nvidia(device)


def can_allocate_in_capture(device: torch.device) -> bool:
    """Whether a captured forward may allocate: not with the allocator cudaMallocAsync, ComfyUI's default."""
    return is_nvidia(device) and torch.cuda.get_allocator_backend() == "native"


@contextmanager
def capture(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any = None) -> Iterator[None]:
    """Captures the launches inside the block, which allocate from `pool`."""
    # Collecting an old graph inside the block would end the capture.
    with collector_paused(), _CAPTURING, on_stream(capture_stream(device)):
        # Other threads of a host may call the CUDA API meanwhile.
        options = {} if pool is None else {"pool": pool}
        graph.capture_begin(capture_error_mode="thread_local", **options)
        try:
            yield
        except BaseException:
            with suppress(RuntimeError):  # the capture is over already
                graph.capture_end()
            raise
        graph.capture_end()


@contextmanager
def on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Runs the block's launches on `stream`, after all earlier launches and before all later ones."""
    before = torch.cuda.current_stream(stream.device)
    stream.wait_stream(before)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:  # after an error too, since memory freed then may still be in use on the stream
        before.wait_stream(stream)


class GraphMemory:
    """One block of memory for the intermediate values of all graphs of a network, of which one runs at a time.

    shared: gives it to other networks of the device too, which run in turn; None: it is this network's own
    """

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        self.is_shared = False
        self.shared: SharedWorkspaces | None = None
        self.users: WeakSet[Graphed] = WeakSet()

    def size(self, device: torch.device) -> int:
        """Bytes that it takes on the device, for this network alone."""
        return 0 if self.is_shared or not self._has(device) else self.memory.nbytes  # type: ignore[union-attr]

    def _has(self, device: torch.device, size: int = 0) -> bool:
        return self.memory is not None and self.memory.device == device and self.memory.nbytes >= size

    def reserve(self, size: int, device: torch.device, user: Graphed) -> Tensor:
        """Memory of at least `size` bytes, kept as long as `user`. Growing drops graphs in the old memory."""
        if not self._has(device, size):
            for other in list(self.users):
                other.drop()
            self.users.clear()
            self.memory = None
            self.is_shared = self.shared is not None
            self.memory = (self.shared or SharedWorkspaces()).take(size, device)
        assert self.memory is not None
        self.users.add(user)
        return self.memory


class Graphed:
    """`forward(x)` of one shape of x: eager the first time, captured the second time, replayed from then on.

    The eager call compiles kernels and plans the memory that the forward needs. A forward that allocates further
    memory is captured only where the allocator allows it; otherwise it stays eager, as does one for which memory is
    short. Everything else that it reads must stay at the same addresses.
    """

    def __init__(self, memory: GraphMemory):
        self._memory = memory
        self._plan: workspace.MemoryPlan | None = None
        self._captured: CapturedForward | None = None
        self._eager = False

    @property
    def workspace_bytes(self) -> int | None:
        """Bytes of the graph's intermediate values; None where there is no graph, or not yet."""
        return None if self._plan is None or self._eager else self._plan.size

    def drop(self) -> None:
        """Frees the graph; it is captured again when it is needed."""
        self._captured = None

    def move_to(self, memory: GraphMemory) -> None:
        """Frees the graph, as `drop`; the next one is in this memory. How much it needs is known by then."""
        self.drop()
        self._memory, self._eager = memory, False

    def __call__(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self._eager:
            return forward(x)
        if self._plan is None:
            with workspace.planning() as plan:
                result = forward(x)
            self._plan = plan
            return result
        if self._captured is None:
            self._captured = self._capture(forward, x, self._plan)
        if self._captured is None:
            self._eager = True
            return forward(x)
        return self._captured(x)

    def _capture(
        self, forward: Callable[[Tensor], Tensor], x: Tensor, plan: workspace.MemoryPlan
    ) -> CapturedForward | None:
        try:
            memory = self._memory.reserve(plan.size, x.device, self)
            return CapturedForward(forward, x, plan, memory)
        except AllocatesError as error:
            logger.warning("%s It runs without a CUDA graph, which takes longer.", error)
        except Exception as error:
            if not out_of_memory(error):
                still_computes(x.device)  # clears the error; a kernel's comes back in the eager forward
                logger.warning(
                    "No CUDA graph could be captured (%s): forwards take longer.", reason_of(error)
                )
        return None  # eager forwards are only a little slower


class CapturedForward:
    """`forward(x)`, captured with its intermediate values in `memory`.

    Raises AllocatesError, before the capture, for a forward that allocates where a capture may not.
    """

    def __init__(
        self, forward: Callable[[Tensor], Tensor], x: Tensor, plan: workspace.MemoryPlan, memory: Tensor
    ):
        self.graph, self.static_input, self.memory = torch.cuda.CUDAGraph(), x.clone(), memory

        def run() -> Tensor:
            with workspace.within(plan, memory):
                return forward(self.static_input)

        with on_stream(capture_stream(x.device)):
            if can_allocate_in_capture(x.device):
                run()  # for cuBLAS's workspace
            elif all(allocates(run, x.device) for _ in range(REHEARSALS)):
                raise AllocatesError(f"A forward of {tuple(x.shape)} allocates memory as it runs.")
        with capture(self.graph, x.device):
            self.static_output = run()

    def __call__(self, x: Tensor) -> Tensor:
        self.static_input.copy_(x)
        self.graph.replay()
        return self.static_output.clone()


def allocates(run: Callable[[], object], device: torch.device) -> bool:
    """Whether a call allocates memory, even if it frees it again.

    cudaMallocAsync counts in units of several kB, so a smaller temporary value goes unnoticed.
    """
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) > before
