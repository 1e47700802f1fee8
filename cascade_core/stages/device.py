"""Where networks run, in which precision, and how much of the device's memory they may take."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypeVar

import torch
from torch import nn

from ..accelerators import ACCELERATORS, count, has_bf16, is_nvidia
from ..adapters.apply import Patch, patched
from ..errors import CascadeError, quoted
from ..networks.precision import PRECISIONS
from ..networks.quantisation import FORMATS
from ..placement import CudaDevice, DeviceMemory, PlainMemory, RunBytes, WeightConsumer, parse_bytes
from ..run import RunObserver

T = TypeVar("T")

DTYPES = ("auto", "bf16", "fp16", "fp32", *FORMATS)


class ComputeDevice:
    """A device, and the memory that the networks on it share.

    device    "auto": the first accelerator that torch finds (CUDA or ROCm, XPU, MPS), else the CPU
    memory    how much of a card's memory to take, in bytes or as text ("6GB"); None: the free memory
    observer  told where a run begins again in less memory, and asked whether to stop

    On the CPU weights are where they are used. On an NVIDIA card they stay as far as they fit, make room for each
    other, or are streamed (`placement`); on any other they are moved whole.
    """

    def __init__(
        self,
        device: str | torch.device = "auto",
        memory: int | str | None = None,
        observer: RunObserver | None = None,
    ):
        self.device = chosen_device(device)
        is_bytes = isinstance(memory, int | float) and not isinstance(memory, bool) and 1 <= memory < math.inf
        if not (memory is None or isinstance(memory, str) or is_bytes):
            raise CascadeError(f"memory is {quoted(memory)}; give bytes above 0, or a text such as 6GB.")
        self.observer = observer or RunObserver()
        self.limit = parse_bytes(memory) if isinstance(memory, str) else memory

    @cached_property
    def pool(self) -> DeviceMemory | PlainMemory | None:
        """The pool that shares a card's memory among networks; None on the CPU."""
        if self.device.type == "cpu":
            return None
        if is_nvidia(self.device):
            return DeviceMemory(CudaDevice(self.device, self.limit))
        return PlainMemory(self.device, None if self.limit is None else int(self.limit))

    def run(
        self,
        network: nn.Module,
        body: Callable[[torch.device], T],
        workspace_bytes: int = 0,
        patches: Sequence[Patch] = (),
        single_use: bool = False,
        consumer: WeightConsumer | None = None,
        known_bytes: RunBytes | None = None,
    ) -> T:
        """body(device), with the network there and patched.

        workspace_bytes  memory that the body takes beside the weights
        single_use       the body runs the network once
        consumer         the engine that the body calls in the network's place
        known_bytes      what the body is known to take beside weights that are resident

        Where memory runs out, the body is run again from its beginning in a smaller placement, and the observer is
        told.
        """
        if self.pool is not None:
            return self.pool.run(
                network,
                body,
                workspace_bytes,
                patches,
                self.observer.notify,
                single_use,
                consumer,
                known_bytes,
            )
        with patched(network, patches):
            return body(self.device)

    def close(self) -> None:
        """Takes all weights off the card. They come back when they are used again."""
        if self.pool is not None:
            self.pool.release()

    @property
    def places(self) -> bool:
        """Whether the pool, and not the loader, reads and casts weights on their way to a card."""
        return self.pool is not None

    def weight_dtype(self, name: str) -> torch.dtype:
        """Precision by its name in DTYPES. auto: float32 on the CPU, bf16 on a card that has it, else fp16.

        fp8, int8: large weights in 8 bits (networks/quantisation.py), and the others as for auto. Raises CascadeError
        for another name, and for fp8 on Apple's devices.
        """
        check_eight_bit(name, self.device)
        if name in ("auto", *FORMATS):
            if self.device.type == "cpu":
                return torch.float32
            return torch.bfloat16 if has_bf16(self.device) else torch.float16
        if not isinstance(name, str) or name not in PRECISIONS:
            raise CascadeError(f"dtype {quoted(name)} is not known; choose {', '.join(DTYPES)}.")
        return PRECISIONS[name]

    def picture_dtype(self) -> torch.dtype:
        """Stage A's precision: bf16 on cards that have it (its rounding is below 8 bits), else float32."""
        halves = self.device.type == "cuda" and has_bf16(self.device)
        return torch.bfloat16 if halves else torch.float32

    def encoder_dtype(self) -> torch.dtype:
        """CLIP's precision: float32 on the CPU, where half precision is slow; else half precision, as published."""
        return torch.float32 if self.device.type == "cpu" else torch.float16


def check_eight_bit(name: str, device: torch.device) -> None:
    """Raises CascadeError for weights in fp8 on Apple's devices."""
    if name == "fp8" and device.type == "mps":
        raise CascadeError("Apple's devices have no fp8; choose auto, fp16 or int8.")


def chosen_device(device: str | torch.device) -> torch.device:
    """The device of a name, with its index. Raises CascadeError for one that is not there."""
    if isinstance(device, str) and device == "auto":
        device = next((kind for kind in ACCELERATORS if count(kind)), "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        chosen = None
    if chosen is None or chosen.type not in ("cpu", *ACCELERATORS) or isinstance(device, bool):
        raise CascadeError(f"device is {quoted(device)}; choose auto, cpu, cuda, cuda:N, xpu, xpu:N or mps.")
    if chosen.type == "cpu":
        return chosen
    found = count(chosen.type)
    if not found:
        raise CascadeError(
            f"device is {device}, but torch finds {_NONE[chosen.type]} here; choose auto or cpu."
        )
    if (chosen.index or 0) >= found:
        raise CascadeError(f"device is {device}, but there are {found} cards here.")
    if chosen.index is None:
        current = 0 if chosen.type == "mps" else torch.get_device_module(chosen.type).current_device()
        return torch.device(chosen.type, current)
    return chosen


_NONE = {"cuda": "no CUDA card", "xpu": "no Intel XPU", "mps": "no Apple GPU"}
