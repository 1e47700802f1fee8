"""The operations of `cuda.py` for NVIDIA cards before Ampere, for which Triton has no matrix instructions.

Products are cuBLAS's and attention is PyTorch's; the kernels do the memory-bound rest. Only kernels without features
of newer cards are used: the response norm takes three launches, since the registers that a single one would need are
counted for Ampere. PyTorch's attention allocates its result, so that forwards are captured under PyTorch's own
allocator alone.
"""

from __future__ import annotations

from torch import Tensor

from .cuda import (
    add_linear_,
    compile_ahead,
    depthwise_norm,
    formats,
    gelu_response_scale_,
    linear,
    modulate_,
    modulate_norm_,
    norm,
    project,
    resample_by_products,
)
from .graphs import can_allocate_in_capture as can_capture
from .kernels.response import apply_response
from .operations import attention

__all__ = [
    "add_linear_",
    "attention",
    "can_capture",
    "channelwise_",
    "compile_ahead",
    "depthwise_norm",
    "formats",
    "linear",
    "modulate_",
    "modulate_norm_",
    "norm",
    "project",
    "resample_by_products",
]


def channelwise_(
    x: Tensor,
    h: Tensor,
    expand: Tensor,
    bias: Tensor,
    gamma: Tensor,
    contract: Tensor,
    h_scale: float = 1.0,
    x_scale: float = 1.0,
) -> None:
    h = linear(h, expand, bias)
    add_linear_(x, apply_response(h, gelu_response_scale_(h, gamma, h_scale, x_scale)), contract)
