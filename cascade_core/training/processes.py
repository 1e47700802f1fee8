"""The processes of a run, on one machine or several, and their communication in main memory.

Nothing here needs a shared folder. Waiting has no timeout: a process may work for hours, and one that dies closes its
connections, which the others notice at once.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..errors import CascadeError, Interrupted, excerpt, on_one_line, printable

if TYPE_CHECKING:
    from accelerate import Accelerator

PATIENCE = timedelta(days=30)
SHOWN = 8  # differences in a message
PART_BYTES = 64_000_000  # of a tensor sent in one message

T = TypeVar("T")


class Processes:
    """The parts of accelerate that training uses, and communication in main memory beside the accelerators' own."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.process_index, self.num_processes = accelerator.process_index, accelerator.num_processes
        self.is_main_process = accelerator.is_main_process
        self.is_local_main_process = accelerator.is_local_main_process
        self._group: Any = None
        if self.num_processes > 1:
            self._group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes, by the accelerators' own communication."""
        if self.num_processes == 1:
            return value
        reduced = self.accelerator.reduce(value, reduction="mean")
        assert isinstance(reduced, Tensor)
        return reduced

    def wait(self) -> None:
        """Barrier: wait until all processes have reached it."""
        if self._group is not None:
            torch.distributed.barrier(group=self._group)

    def tell(self, value: T, source: int = 0) -> T:
        """Broadcasts process `source`'s value, of JSON types, to all."""
        if self._group is None:
            return value
        own = self.process_index == source
        data = _as_bytes(value) if own else torch.empty(0, dtype=torch.uint8)
        length = torch.tensor([len(data)])
        torch.distributed.broadcast(length, source, group=self._group)
        if not own:
            data = torch.empty(int(length), dtype=torch.uint8)
        self.spread(data, source)
        return _of_bytes(data)

    def gather(self, value: T) -> list[T]:
        """All processes' values, of JSON types, in every process."""
        if self._group is None:
            return [value]
        data = _as_bytes(value)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.num_processes)]
        torch.distributed.all_gather(lengths, torch.tensor([len(data)]), group=self._group)
        padded = torch.zeros(int(max(lengths)), dtype=torch.uint8)
        padded[: len(data)] = data
        rows = [torch.empty_like(padded) for _ in lengths]
        torch.distributed.all_gather(rows, padded, group=self._group)
        return [_of_bytes(row[: int(length)]) for row, length in zip(rows, lengths, strict=True)]

    def spread(self, tensor: Tensor, source: int) -> None:
        """Broadcasts process `source`'s tensor in main memory into this one, contiguous and of the same size."""
        if self._group is not None:
            for part in _parts(tensor):
                torch.distributed.broadcast(part, source, group=self._group)

    def to_main(self, tensor: Tensor, source: int) -> None:
        """Copies process `source`'s tensor in main memory into the main process's; called by these two alone."""
        if self._group is None or source == 0:
            return
        for part in _parts(tensor):
            if self.is_main_process:
                torch.distributed.recv(part, source, group=self._group)
            else:
                torch.distributed.send(part, 0, group=self._group)

    def same(self, tensor: Tensor) -> None:
        """Overwrites a tensor on the accelerator with the main process's."""
        if self._group is not None:
            torch.distributed.broadcast(tensor, 0)

    def on_main(self, work: Callable[[], T]) -> T:
        """Calls `work` in the main process; its result, of JSON types, or its error becomes that of all processes."""
        if self._group is None:
            return work()
        outcome: list[Any] = [None, None, None]
        if self.is_main_process:
            try:
                outcome[0] = work()
            except (CascadeError, Interrupted) as error:
                outcome[1:] = _described(error)
        value, kind, message = self.tell(outcome)
        if kind is not None:
            self._end_together()
            raise _error(kind, message)
        return value

    def on_each(self, work: Callable[[], T]) -> T:
        """Calls `work` in every process. An error in one of them is raised in all, with the process's name."""
        if self._group is None:
            return work()
        value, outcome = None, list[Any]([None, None])
        try:
            value = work()
        except (CascadeError, Interrupted) as error:
            outcome = _described(error)
        outcomes = self.gather([*outcome, socket.gethostname()])
        for index, (kind, message, host) in enumerate(outcomes):
            if kind is not None:
                self._end_together()
                raise _error(kind, message if index == 0 else f"{self.name(index, host)}: {message}")
        return value  # pyright: ignore[reportReturnType]

    def serve(self, answer: Callable[[str], T], work: Callable[[Callable[[str], T]], None]) -> None:
        """Calls `work` in the main process; whenever it requests a name, all processes call `answer` with that name."""

        def ask(name: str) -> T:
            self.tell([name])
            return answer(name)

        def ask_until_done() -> None:
            try:
                work(ask)
            finally:
                self.tell([])

        if not self.is_main_process:
            while asked := self.tell([""]):
                answer(asked[0])
        self.on_main(ask_until_done)

    def compare(self, values: Mapping[str, str]) -> None:
        """Raises CascadeError, in all, unless every process has the main one's values, which are given by name."""
        if self._group is None:
            return
        hosts, everyone = self.gather(socket.gethostname()), self.gather(dict(values))
        expected = everyone[0]
        for index, (own, host) in enumerate(zip(everyone, hosts, strict=True)):
            differing = [key for key in own if own[key] != expected.get(key)]
            if differing:
                shown = [f"{key}: {_cut(expected.get(key))} → {_cut(own[key])}" for key in differing[:SHOWN]]
                more = f"; and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
                self._end_together()
                raise CascadeError(
                    f"{self.name(index, host)}, would train something else than process 0 ({'; '.join(shown)}{more}); "
                    "give all of them the same settings, pictures and networks."
                )

    def name(self, index: int, host: str) -> str:
        """A process's name in a sentence."""
        return f"Process {index} of {self.num_processes}, on {host}"

    @contextmanager
    def naming_the_lost(self) -> Iterator[None]:
        """Say, in place of the exchange's own error, that another process is gone."""
        try:
            yield
        except RuntimeError as error:
            known = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
            if self._group is None or not known:
                raise
            own, reason = self.name(self.process_index, socket.gethostname()), on_one_line(error)
            raise CascadeError(
                f"{own}, has lost another one, which has ended or cannot be reached ({excerpt(reason, 160)}); its own "
                "output says why. Start all of them again: the same command goes on from the last checkpoint."
            ) from error

    def _end_together(self) -> None:
        """Waits before an error that all raise: the first process to end closes connections that others still read."""
        with suppress(RuntimeError):
            self.wait()


def _cut(value: str | None) -> str:
    return "none" if value is None else printable(value, 120)


def _described(error: Exception) -> list[Any]:
    return ["interrupted" if isinstance(error, Interrupted) else "error", str(error)]


def _error(kind: str, message: str) -> Exception:
    return Interrupted(message) if kind == "interrupted" else CascadeError(message)


def _parts(tensor: Tensor) -> Iterable[Tensor]:
    """A tensor's bytes in parts of up to PART_BYTES."""
    return tensor.detach().reshape(-1).view(torch.uint8).split(PART_BYTES) if tensor.numel() else ()


def _as_bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _of_bytes(data: Tensor) -> Any:
    return json.loads(data.numpy().tobytes())
