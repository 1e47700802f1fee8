"""`operations.py` as fused kernels: the same functions, for CUDA."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from . import operations
from .kernels import attention as attention_kernel
from .kernels import depthwise, modulation, products, resident, response
from .kernels.launch import compile_ahead
from .operations import EPS, add_linear_, linear, project

__all__ = [
    "add_linear_",
    "attention",
    "channelwise_",
    "compile_ahead",
    "depthwise_norm",
    "linear",
    "modulate_",
    "modulate_norm_",
    "norm",
    "project",
]

HEAD_WIDTHS = (16, 32, 64, 128)  # that the kernel knows
LARGEST_BATCH, LARGEST_HIDDEN = 64, 8192  # of what can be held by the device's registers
# Of many positions, five programs of attention run on a multiprocessor of Hopper's instead of four.
MANY = 512
FIVE = {"num_stages": 2, "tma": True, "registers": 96}


def norm(x: Tensor, eps: float = EPS) -> Tensor:
    return modulation.norm(x, torch.empty_like(x), eps)


def depthwise_norm(
    x: Tensor, size: tuple[int, int], weight: Tensor, bias: Tensor, eps: float = EPS
) -> Tensor:
    return depthwise.depthwise_norm(x, weight, bias, *size, eps, torch.empty_like(x))


def channelwise_(x: Tensor, h: Tensor, expand: Tensor, bias: Tensor, gamma: Tensor, contract: Tensor) -> None:
    batch, positions, channels = x.shape
    rows, hidden = batch * positions, len(expand)
    first = products.choose("linear_gelu_response", rows, hidden, h.shape[-1], x.device)
    second = products.choose("scaled_linear_add", rows, channels, hidden, x.device)
    if first is None:
        h = linear(h, expand, bias)
        if second is None and x.is_cuda and resident.fits(h):
            add_linear_(x, resident.gelu_response_norm(h, gamma, waiting_room(x.device)), contract)
            return
        scale = gelu_scale_(h, gamma)
    else:
        partial = x.new_empty(batch, products.response_chunks(positions, first), hidden, dtype=torch.float32)
        out = x.new_empty(batch, positions, hidden)
        products.linear_gelu_response(
            h.flatten(0, 1), expand, bias, positions, out.flatten(0, 1), partial, first
        )
        h, scale = out, _scale(partial, gamma)
    if second is None:
        add_linear_(x, response.apply_response(h, scale), contract)
    else:
        products.scaled_linear_add(h.flatten(0, 1), scale, contract, None, positions, x.flatten(0, 1), second)


def gelu_scale_(h: Tensor, gamma: Tensor) -> Tensor:
    """h = GELU(h); returns what the response norm multiplies it by.  h: (B, N, K) -> (B, K) float32"""
    batch, positions, hidden = h.shape
    chunks = response.response_chunks(positions, hidden)
    partial = h.new_empty(batch, chunks, hidden, dtype=torch.float32)
    response.gelu_response(h, partial)
    return _scale(partial, gamma)


def _scale(partial: Tensor, gamma: Tensor) -> Tensor:
    """Of partial sums of squares (B, chunks, K) -> (B, K)"""
    batch, _, hidden = partial.shape
    return response.response_scale(partial, gamma, partial.new_empty(batch, hidden))


@cache
def waiting_room(device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the programs of `gelu_response_norm` leave their sums: one for the device, of any size it can have."""
    return resident.response_workspace(LARGEST_BATCH, LARGEST_HIDDEN, device)


def modulate_(x: Tensor, scale_shift: Tensor) -> None:
    modulation.modulate(x, scale_shift)


def modulate_norm_(x: Tensor, scale_shift: Tensor, bias: Tensor, eps: float = EPS) -> Tensor:
    return modulation.modulate_norm(x, scale_shift, bias, torch.empty_like(x), eps)


def attention(qkv: Tensor, key: Tensor, value: Tensor, heads: int, self_attn: bool) -> Tensor:
    batch, positions, width = qkv.shape
    if width // 3 // heads not in HEAD_WIDTHS:
        return operations.attention(qkv, key, value, heads, self_attn)
    out = qkv.new_empty(batch, positions, width // 3)
    five = positions >= MANY and width // 3 // heads == 64 and _has_tma(qkv.device)
    return attention_kernel.attention(qkv, key, value, heads, out, self_attn, **(FIVE if five else {}))


@cache
def _has_tma(device: torch.device) -> bool:
    """The tensor memory accelerator."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
