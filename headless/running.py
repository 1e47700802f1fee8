"""The node that is executing, so that a node that saves a picture can write its origin into it.

This is not a hidden input of the node, since two equal nodes would then no longer share their outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_node: ContextVar[str | None] = ContextVar("cascade_node", default=None)


def running_node() -> str | None:
    """Id of the node that is executing; None outside a run."""
    return _node.get()


@contextmanager
def running(node_id: str) -> Iterator[None]:
    """Makes the node with this id the executing one inside the block."""
    token = _node.set(node_id)
    try:
        yield
    finally:
        _node.reset(token)
