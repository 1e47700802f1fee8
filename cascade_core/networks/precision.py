"""The precision that a network computes in, where main memory keeps its weights in another.

A file in bf16 or float32 stays mapped as it is, also where the card computes in fp16: placement casts each unit on
its way to the card. Casting in main memory would take 7.2 GB for Stage C alone, and a free Colab machine has 12.7 GB.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# By the names in settings.
PRECISIONS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}


def cast_on_the_way(network: Any, dtype: torch.dtype | None) -> None:
    """Makes placement cast the network's weights to `dtype` on the device; None: no cast."""
    network.compute_dtype = dtype


def cast_dtype(network: nn.Module) -> torch.dtype | None:
    """The dtype that placement casts the network's weights to; None: they are not cast."""
    return getattr(network, "compute_dtype", None)


def compute_dtype(network: nn.Module) -> torch.dtype:
    """The dtype of the network's weights where it runs."""
    return cast_dtype(network) or next(network.parameters()).dtype


def dtype_on_device(stored: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a tensor after casting: `dtype`, or its own where that is not floating-point or `dtype` is None."""
    return stored if dtype is None or not stored.is_floating_point else dtype
