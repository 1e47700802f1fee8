"""The device that nodes compute on without ComfyUI: of the graph that is running, else one for the process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

from ....cascade_core.run import Observer
from ....cascade_core.stages.device import ComputeDevice
from ..reporting import check_interrupted, notify

_running: ContextVar[ComputeDevice | None] = ContextVar("cascade_device", default=None)


def compute_device() -> ComputeDevice:
    """Where what is loaded now will run."""
    return _running.get() or _device_of_the_process()


@contextmanager
def computing_with(memory: str | None) -> Iterator[ComputeDevice]:
    """Limits nodes that run inside the block to so much of the card's memory ("6GB"); None: what is free."""
    token = _running.set(ComputeDevice(memory=memory, observer=Observer(notify, check_interrupted)))
    try:
        yield compute_device()
    finally:
        _running.reset(token)


@cache
def _device_of_the_process() -> ComputeDevice:
    """For nodes that are called from Python. `$CASCADE_MEMORY` caps its memory, as for the command line."""
    memory = os.environ.get("CASCADE_MEMORY")
    return ComputeDevice(memory=memory, observer=Observer(notify, check_interrupted))
