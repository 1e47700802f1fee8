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
    with computing_on(device_with(memory)) as device:
        yield device


@contextmanager
def computing_on(device: ComputeDevice) -> Iterator[ComputeDevice]:
    """Makes nodes that run inside the block compute on a device, which keeps what is loaded on it."""
    token = _running.set(device)
    try:
        yield device
    finally:
        _running.reset(token)


def device_with(memory: str | None) -> ComputeDevice:
    """A device of its own, with so much of the card's memory; None: what is free."""
    return ComputeDevice(memory=memory, observer=Observer(notify, check_interrupted))


@cache
def _device_of_the_process() -> ComputeDevice:
    """Device of nodes that are called from Python. `$CASCADE_MEMORY` caps its memory, as for the command line."""
    return device_with(os.environ.get("CASCADE_MEMORY"))
