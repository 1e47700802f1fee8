"""Where networks run, in which precision, and how much of the device's memory they may take."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypeVar

import torch
from torch import nn

from ..adapters.apply import Patch, patched
from ..engine import Precision, operations_on
from ..errors import CascadeError, quoted
from ..placement import CudaDevice, DeviceMemory, WeightConsumer, parse_bytes
from ..run import Observer

T = TypeVar("T")

DTYPES = ("auto", "bf16", "fp16", "fp32", "fp8")
_NAMED = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class ComputeDevice:
    """A device, and the memory that the networks on it share.

    device    "auto": CUDA where there is one, else the CPU
    memory    how much of a card's memory to take, in bytes or as text ("6GB"); None: what is free
    observer  told where a run begins again in less memory, and asked whether to stop

    On the CPU weights are where they are used. On a card they stay as far as they fit, make room for each other, or
    are streamed (`placement`).
    """

    def __init__(
        self,
        device: str | torch.device = "auto",
        memory: int | str | None = None,
        observer: Observer | None = None,
    ):
        self.device = chosen_device(device)
        is_bytes = isinstance(memory, int | float) and not isinstance(memory, bool) and 1 <= memory < math.inf
        if not (memory is None or isinstance(memory, str) or is_bytes):
            raise CascadeError(f"memory is {quoted(memory)}; give bytes above 0, or a text such as 6GB.")
        self.observer = observer or Observer()
        self.limit = parse_bytes(memory) if isinstance(memory, str) else memory

    @cached_property
    def pool(self) -> DeviceMemory | None:
        """What the memory of a card is shared by; None on the CPU."""
        return DeviceMemory(CudaDevice(self.device, self.limit)) if self.device.type == "cuda" else None

    def run(
        self,
        network: nn.Module,
        body: Callable[[torch.device], T],
        workspace_bytes: int = 0,
        patches: Sequence[Patch] = (),
        single_use: bool = False,
        consumer: WeightConsumer | None = None,
    ) -> T:
        """body(device), with the network there and patched.

        workspace_bytes  what the body takes beside the weights
        single_use       the body runs the network once
        consumer         the engine that the body calls in the network's place

        Out of memory, the body is run again from its beginning in a smaller placement, and the observer is told.
        """
        if self.pool is not None:
            return self.pool.run(
                network, body, workspace_bytes, patches, self.observer.notify, single_use, consumer
            )
        with patched(network, patches):
            return body(self.device)

    def close(self) -> None:
        """Takes all weights off the card. They come back when they are used again."""
        if self.pool is not None:
            self.pool.release()

    @property
    def places(self) -> bool:
        """Whether weights are read and cast on their way to a card, by the pool, and not by a loader."""
        return self.pool is not None

    def weight_dtype(self, name: str) -> torch.dtype:
        """Precision by its name in DTYPES. auto: float32 on the CPU, bf16 on a card, or fp16 where it has none.

        fp8: bf16, of which the engine makes its own e4m3 copies (`engine_precision`).
        Raises CascadeError for another name, and for fp8 on a device that cannot multiply in it.
        """
        if name == "auto":
            if self.device.type == "cpu":
                return torch.float32
            return torch.bfloat16 if self._has_bf16() else torch.float16
        if name == "fp8":
            operations_on(self.device, "fp8")  # refuses the device before a file is read
            return torch.bfloat16
        if not isinstance(name, str) or name not in _NAMED:
            raise CascadeError(f"dtype {quoted(name)} is not known; choose auto, {', '.join(_NAMED)} or fp8.")
        return _NAMED[name]

    def picture_dtype(self) -> torch.dtype:
        """Stage A's precision: bf16 where the device has it (its rounding is below 8 bits), else float32."""
        return torch.bfloat16 if self._has_bf16() else torch.float32

    def encoder_dtype(self) -> torch.dtype:
        """CLIP's precision: float32 on the CPU, where halves are slow; else half precision, as it was published."""
        return torch.float32 if self.device.type == "cpu" else torch.float16

    def _has_bf16(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def engine_precision(dtype: str) -> Precision:
    """The precision that the engine multiplies in, by the name of a dtype."""
    return "fp8" if dtype == "fp8" else "exact"


def chosen_device(device: str | torch.device) -> torch.device:
    """The device of a name, with its index. Raises CascadeError for one that is not there."""
    if isinstance(device, str) and device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda") or isinstance(device, bool):
        raise CascadeError(f"device is {quoted(device)}; choose auto, cpu, cuda or cuda:N.")
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise CascadeError(f"device is {device}, but torch finds no CUDA card here; choose auto or cpu.")
        if (chosen.index or 0) >= torch.cuda.device_count():
            raise CascadeError(f"device is {device}, but there are {torch.cuda.device_count()} cards here.")
        return torch.device("cuda", torch.cuda.current_device() if chosen.index is None else chosen.index)
    return chosen
