"""Which device and precision the headless host computes in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ....cascade_core.errors import CascadeError

_NAMED = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compute_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def weight_dtype(name: str) -> torch.dtype:
    """Precision by name. auto: float32 on the CPU, where halves are slow, else bf16, or fp16 on a card without it."""
    if name == "auto":
        if compute_device().type == "cpu":
            return torch.float32
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float16
    if name == "fp8":
        raise CascadeError(
            "dtype fp8 needs ComfyUI, whose layers cast as they go; outside it choose auto, bf16 or fp32."
        )
    if name not in _NAMED:
        raise CascadeError(f"dtype {name!r} is not known; choose auto, {', '.join(_NAMED)} or fp8.")
    return _NAMED[name]


@contextmanager
def on_device(*modules: nn.Module | None) -> Iterator[torch.device]:
    """Modules are on the compute device inside the block, and back in main memory after it."""
    device = compute_device()
    present = [module for module in modules if module is not None]
    if device.type == "cpu":
        yield device
        return
    try:
        for module in present:
            module.to(device)
        yield device
    finally:
        for module in present:
            module.to("cpu")
