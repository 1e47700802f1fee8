"""The device that nodes compute on without ComfyUI: the running graph's, else one for the process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

from ....cascade_core.run import RunObserver
from ....cascade_core.stages.device import ComputeDevice
from ..reporting import check_interrupted, notify

_running: ContextVar[ComputeDevice | None] = ContextVar("cascade_device", default=None)


def compute_device() -> ComputeDevice:
    """The device for networks that are loaded now."""
    return _running.get() or _device_of_the_process()


@contextmanager
def computing_with(memory: str | None) -> Iterator[ComputeDevice]:
    """Limits nodes that run inside the block to this much of the card's memory ("6GB"); None: the free memory."""
    with computing_on(device_with(memory)) as device:
        yield device


@contextmanager
def computing_on(device: ComputeDevice) -> Iterator[ComputeDevice]:
    """Makes nodes that run inside the block compute on a device, which keeps the loaded networks."""
    token = _running.set(device)
    try:
        yield device
    finally:
        _running.reset(token)


def device_with(memory: str | None) -> ComputeDevice:
    """A new device with this much of the card's memory; None: the free memory."""
    return ComputeDevice(memory=memory, observer=RunObserver(notify, check_interrupted))


@cache
def _device_of_the_process() -> ComputeDevice:
    """The device for nodes called from Python. `$CASCADE_MEMORY` limits its memory, as for the command line."""
    return device_with(os.environ.get("CASCADE_MEMORY"))
