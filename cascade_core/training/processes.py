"""The processes of a run, on one machine or several, and what they tell each other in main memory.

Nothing here goes through a shared folder. Whoever waits, waits as long as it takes: a process that works for hours ends
nobody's patience, and one that dies ends its connections, which is seen at once.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..errors import CascadeError, Interrupted, printable

if TYPE_CHECKING:
    from accelerate import Accelerator

PATIENCE = timedelta(days=30)
SHOWN = 8  # differences in a message
PART_BYTES = 64_000_000  # of a tensor that are sent at once

T = TypeVar("T")


class Processes:
    """What training uses of accelerate, and an exchange in main memory beside the accelerators' own."""

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
        """The mean over all processes, by the accelerators' own exchange."""
        if self.num_processes == 1:
            return value
        reduced = self.accelerator.reduce(value, reduction="mean")
        assert isinstance(reduced, Tensor)
        return reduced

    def wait(self) -> None:
        """Wait until all have come here."""
        if self._group is not None:
            torch.distributed.barrier(group=self._group)

    def tell(self, value: T, source: int = 0) -> T:
        """The value of process `source`, in all; of what JSON holds."""
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
        """Every process's value, in all; of what JSON holds."""
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
        """Overwrite a tensor in main memory, contiguous and of one size everywhere, by that of process `source`."""
        if self._group is not None:
            for part in _parts(tensor):
                torch.distributed.broadcast(part, source, group=self._group)

    def to_main(self, tensor: Tensor, source: int) -> None:
        """Overwrite a tensor in the main process's main memory by that of process `source`; for both to call."""
        if self._group is None or source == 0:
            return
        for part in _parts(tensor):
            if self.is_main_process:
                torch.distributed.recv(part, source, group=self._group)
            else:
                torch.distributed.send(part, 0, group=self._group)

    def same(self, tensor: Tensor) -> None:
        """Overwrite a tensor on the accelerator by the main process's."""
        if self._group is not None:
            torch.distributed.broadcast(tensor, 0)

    def on_main(self, work: Callable[[], T]) -> T:
        """Do something in the main process; what it returns, of what JSON holds, or raises is all processes'."""
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
        """Do something in every process. What one of them raises is raised in all, and says where."""
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
        """Do `work` in the main process; whenever it asks for a name, all processes call `answer` with it."""

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
        """Raise CascadeError, in all, unless every process has the same values as the main one; by what they are of."""
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
        """What a process is called in a sentence."""
        return f"Process {index} of {self.num_processes}, on {host}"

    def _end_together(self) -> None:
        """Wait before an error that all raise: whoever ends first closes connections that others still read."""
        with suppress(RuntimeError):
            self.wait()


def _cut(value: str | None) -> str:
    return "none" if value is None else printable(value, 120)


def _described(error: Exception) -> list[Any]:
    return ["interrupted" if isinstance(error, Interrupted) else "error", str(error)]


def _error(kind: str, message: str) -> Exception:
    return Interrupted(message) if kind == "interrupted" else CascadeError(message)


def _parts(tensor: Tensor) -> Iterable[Tensor]:
    """A tensor's bytes in parts that are small beside a machine's memory."""
    return tensor.detach().reshape(-1).view(torch.uint8).split(PART_BYTES) if tensor.numel() else ()


def _as_bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _of_bytes(data: Tensor) -> Any:
    return json.loads(data.numpy().tobytes())
