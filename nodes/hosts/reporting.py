"""How a running node tells the embedded host how far it is, and learns that it should stop.

The host sets a sink for the node that it is executing (`reporting_to`); samplers call `report` and
`check_interrupted` once a step. Outside a run both do nothing, so that a node called from Python just works.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from ...cascade_core.errors import Interrupted


class Sink(Protocol):
    """Where the steps of one node go."""

    def step(self, step: int, total: int, preview: Any) -> None:
        """`step` of `total` steps are done; `preview` is an (H, W, 3) image in [0, 1], or None."""
        ...

    def tell(self, text: str) -> None:
        """Something that the user should know of this node, in a sentence."""
        ...

    def interrupted(self) -> bool:
        """Whether the run should stop before its next step."""
        ...


_sink: ContextVar[Sink | None] = ContextVar("cascade_sink", default=None)


def report(step: int, total: int, preview: Any = None) -> None:
    """Say that `step` of `total` steps are done. `preview`: an (H, W, 3) image in [0, 1], or None."""
    sink = _sink.get()
    if sink is not None:
        sink.step(step, total, preview)


def tell(text: str) -> None:
    """Say something that the user should know of the node that is running."""
    sink = _sink.get()
    if sink is not None:
        sink.tell(text)


def check_interrupted() -> None:
    """Raise `Interrupted` if the run was asked to stop."""
    sink = _sink.get()
    if sink is not None and sink.interrupted():
        raise Interrupted("The run was stopped.")


@contextmanager
def reporting_to(sink: Sink | None) -> Iterator[None]:
    """Send the reports made inside this block to `sink`."""
    token = _sink.set(sink)
    try:
        yield
    finally:
        _sink.reset(token)
