"""Progress, messages and interruption between a running node and the embedded host.

The host sets a sink for the node that it is executing (`reporting_to`); samplers call `report` and
`check_interrupted` once a step. Outside a run both do nothing, so that nodes can be called from Python.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from ...cascade_core.errors import Interrupted

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Receiver of one node's progress."""

    def step(self, step: int, total: int, preview: Any) -> None:
        """Receives that `step` of `total` steps are done; `preview` is an (H, W, 3) image in [0, 1], or None."""
        ...

    def notify(self, text: str) -> None:
        """Receives a message for the user about this node, in a sentence."""
        ...

    def interrupted(self) -> bool:
        """Whether the run should stop before its next step."""
        ...


_sink: ContextVar[Sink | None] = ContextVar("cascade_sink", default=None)


def report(step: int, total: int, preview: Any = None) -> None:
    """Reports that `step` of `total` steps are done. `preview`: an (H, W, 3) image in [0, 1], or None."""
    sink = _sink.get()
    if sink is not None:
        sink.step(step, total, preview)


def notify(text: str, in_panel: bool = False) -> None:
    """Sends the user a message about the running node, or logs it where no node runs; there are no panels here."""
    sink = _sink.get()
    if sink is not None:
        sink.notify(text)
    else:
        logger.warning("%s", text)


def check_interrupted() -> None:
    """Raises `Interrupted` if the run was asked to stop."""
    sink = _sink.get()
    if sink is not None and sink.interrupted():
        raise Interrupted("The run was stopped.")


@contextmanager
def reporting_to(sink: Sink | None) -> Iterator[None]:
    """Sends the reports made inside the block to `sink`."""
    token = _sink.set(sink)
    try:
        yield
    finally:
        _sink.reset(token)
