"""Which device and precision the headless host computes in, and how networks get there."""

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeVar

import torch
from torch import nn

from ....cascade_core.adapters.apply import Patch, patched
from ....cascade_core.engine import Precision, operations_on
from ....cascade_core.errors import CascadeError
from ....cascade_core.placement import CudaDevice, DeviceMemory, WeightConsumer, parse_bytes
from ..reporting import notify

T = TypeVar("T")

_NAMED = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compute_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def weight_dtype(name: str) -> torch.dtype:
    """Precision by name. auto: float32 on the CPU, bf16 on a card, or fp16 where it has none.

    fp8: bf16, of which the engine makes its own e4m3 copies (`engine_precision`).
    """
    if name == "auto":
        if compute_device().type == "cpu":
            return torch.float32
        return torch.bfloat16 if _card_has_bf16() else torch.float16
    if name == "fp8":
        operations_on(compute_device(), "fp8")  # says so where there is none, before a file is read
        return torch.bfloat16
    if name not in _NAMED:
        raise CascadeError(f"dtype {name!r} is not known; choose auto, {', '.join(_NAMED)} or fp8.")
    return _NAMED[name]


def engine_precision(name: str) -> Precision:
    """In which the engine multiplies."""
    return "fp8" if name == "fp8" else "exact"


def picture_dtype() -> torch.dtype:
    """For Stage A: bf16 on a device that has it, whose rounding is below a picture's 8 bits; else float32."""
    return torch.bfloat16 if _card_has_bf16() else torch.float32


def _card_has_bf16() -> bool:
    return compute_device().type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


@cache
def pool() -> DeviceMemory | None:
    """What the device's memory is shared by; None on the CPU, where weights are where they are used.

    `$CASCADE_MEMORY` (6GB) caps it.
    """
    device = compute_device()
    if device.type == "cpu":
        return None
    limit = os.environ.get("CASCADE_MEMORY")
    device = torch.device("cuda", torch.cuda.current_device())
    return DeviceMemory(CudaDevice(device, parse_bytes(limit) if limit else None))


def on_device(
    network: nn.Module,
    body: Callable[[torch.device], T],
    working: int = 0,
    patches: Sequence[Patch] = (),
    once: bool = False,
    consumer: WeightConsumer | None = None,
) -> T:
    """body(device), with the network there and patched.

    working: bytes that the body takes beside the weights. Out of memory, it is run again from its beginning in a
    smaller placement, and the user is told. once: the body runs the network once. consumer: the
    engine that the body calls in the network's place.
    """
    shared = pool()
    if shared is not None:
        return shared.run(network, body, working, patches, notify, once, consumer)
    with patched(network, patches):
        return body(compute_device())


def read_ahead() -> bool:
    """Whether a loader should read weights at once: not where the pool will, on their way to the device."""
    return pool() is None
