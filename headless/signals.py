"""Signals that ask the process to stop: Ctrl-C, a scheduler's SIGTERM, the SIGHUP of a closed terminal."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTED = 130  # exit status after Ctrl-C: 128 + SIGINT, as in shells
REPEATED = 2.0  # seconds; `timeout` and launchers of many processes send their signal more than once
STOPPING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """A signal that ends the command as Ctrl-C does, but with its own exit status."""

    def __init__(self, number: int):
        super().__init__()
        self.status = 128 + number


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Within the block, a signal that would silently end the process raises Stopped.

    Signals that the surrounding program handles, or ignores as under `nohup`, are left alone.
    """
    first: list[float] = []  # time of the first signal, which is being obeyed

    def stop(number: int, frame: Any) -> None:
        now = time.monotonic()
        if not first or now - first[0] > REPEATED:
            first[:] = [now]
            raise Stopped(number)

    in_main_thread = threading.current_thread() is threading.main_thread()  # others cannot set handlers
    ours = [number for number in STOPPING if in_main_thread and signal.getsignal(number) is signal.SIG_DFL]
    with handling(ours, stop):
        yield


@contextmanager
def handling(numbers: Iterable[int], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Signals go to `handler` within the block."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
