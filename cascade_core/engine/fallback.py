"""Fallback for kernels that fail to compile or to launch: the same computation in a slower way."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch

from ..accelerators import device_name, synchronize
from ..errors import CascadeError, Interrupted, excerpt
from ..placement import out_of_memory

T = TypeVar("T")
Way = TypeVar("Way", bound=str)
Notify = Callable[[str], object]

logger = logging.getLogger(__name__)


class Fallback(Generic[Way]):
    """The remaining ways to compute a network, starting with the fastest that has not failed.

    Error texts are not read, since kernels are named in them in a dozen forms. If a forward fails in one way and not
    in the next, the first way was at fault and is left. If it fails in the last way too, its error is raised and no
    way is left.

    name     of the network, for messages
    ways     each with what its successor costs, as the end of a sentence; the last is never left
    notify   told once of each way that is left
    """

    def __init__(self, name: str, ways: Sequence[tuple[Way, str]], notify: Notify | None = None):
        self.name, self.ways = name, list(ways)
        self.notify = notify or logger.warning

    def run(self, compute: Callable[[Way], T], device: torch.device) -> T:
        """Calls compute(way) with the first way that does not fail; each attempt starts from the beginning.

        Raises CascadeError where the device does not compute any more for the rest of this process.
        """
        reasons: list[str] = []
        while True:
            way, _ = self.ways[len(reasons)]
            try:
                result = compute(way)
                break
            except (CascadeError, Interrupted):
                raise
            except Exception as error:
                if out_of_memory(error):
                    raise
                if not still_computes(device):
                    raise CascadeError(
                        f"{self.name}: {device_name(device)} stopped computing ({reason_of(error)}), and will not "
                        "compute again in this process; start the program again."
                    ) from error
                if len(reasons) + 1 == len(self.ways):
                    raise
                reasons.append(reason_of(error))  # not the error, whose frames hold the attempt's tensors
        left, self.ways = self.ways[: len(reasons)], self.ways[len(reasons) :]
        for (_, loss), reason in zip(left, reasons, strict=True):
            self.notify(
                f"{self.name}: a kernel failed on {device_name(device)} ({reason}); it goes on {loss}."
            )
        return result


def still_computes(device: torch.device) -> bool:
    """Whether a device still computes: after some CUDA errors it does not, for the rest of the process.

    It also clears an earlier error, which the next launch would otherwise report as its own.
    """
    if device.type == "cpu":
        return True
    for _ in range(2):  # the first may report a leftover of the previous error
        try:
            torch.zeros(1, device=device).add_(1)
            synchronize(device)
            return True
        except RuntimeError as error:
            if out_of_memory(error):
                return True
    return False


def reason_of(error: BaseException) -> str:
    """An error on one line: its kind, and the first line of its message."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return excerpt(f"{type(error).__name__}: {first}" if first else type(error).__name__, 200)
