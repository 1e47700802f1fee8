"""What the engine computes with, in plain PyTorch; `cuda.py` offers the same functions as fused kernels.

Feature maps are tokens: (B, N, C) contiguous, N = height · width. A trailing underscore: the first argument is changed
in place.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-6  # of every LayerNorm in the networks
RESPONSE_EPS = 1e-6


def compile_ahead(forward: Callable[[], object]) -> None:
    """Nothing is to be compiled."""


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for what comes next, in blocks of up to 31 MB.

    It would return a feature map's memory to the system, which clears it page by page for the next one: up to half of
    a block's time. glibc takes its measure from the largest block of up to 32 MB that was freed so far (mallopt(3),
    M_MMAP_THRESHOLD), so one is, that nothing is written to.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def norm(x: Tensor, eps: float = EPS) -> Tensor:
    """LayerNorm over the channels, without weights."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, N, C) -> (B, N, C_out)"""
    return F.linear(x, weight, bias)


def depthwise_norm(
    x: Tensor, size: tuple[int, int], weight: Tensor, bias: Tensor, eps: float = EPS
) -> Tensor:
    """LayerNorm of a depthwise 3×3 convolution.  x: (B, N, C) at `size`, weight: (9, C) -> (B, N, C)"""
    channels = x.shape[-1]
    image = x.unflatten(1, size).permute(0, 3, 1, 2)  # (B, C, H, W) in channels-last memory, a view
    kernel = weight.T.reshape(channels, 1, 3, 3)
    h = F.conv2d(image, kernel, bias, padding=1, groups=channels)
    return norm(h.permute(0, 2, 3, 1).flatten(1, 2), eps)


def project(x: Tensor, weight: Tensor | list[Tensor], bias: Tensor) -> Tensor:
    """One product, or one for each of several weights side by side.  (B, N, C) -> (B, N, C_out)"""
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    out = x.new_empty(*x.shape[:-1], len(bias))
    for part, rows, offset in zip(
        out.split([len(w) for w in weight], dim=-1), weight, _offsets(weight), strict=True
    ):
        part.copy_(F.linear(x, rows, bias[offset : offset + len(rows)]))
    return out


def _offsets(weights: list[Tensor]) -> list[int]:
    return [sum(len(before) for before in weights[:i]) for i in range(len(weights))]


def channelwise_(x: Tensor, h: Tensor, expand: Tensor, bias: Tensor, gamma: Tensor, contract: Tensor) -> None:
    """x += contract · response_norm(GELU(expand · h + bias)), the MLP of a residual block without its last biases.

    x: (B, N, C), h: (B, N, C or C + C_skip), expand: (4C, …), gamma: (4C,), contract: (C, 4C)
    """
    h = torch.ops.aten.gelu_(
        F.linear(h, expand, bias)
    )  # in place: a processor waits for memory more than for sums
    response = _length(h)
    share = response / (response.mean(dim=-1, keepdim=True) + RESPONSE_EPS)
    add_linear_(x, h.mul_((1 + gamma * share).to(h.dtype)), contract)


def _length(h: Tensor) -> Tensor:
    """Of each channel over all positions.  (B, N, C) -> (B, 1, C) float32"""
    if (
        h.device.type == "cpu"
    ):  # where PyTorch's own norm takes six times as long, except along the last dimension
        squares = h.square() if h.dtype == torch.float32 else h.float().square_()
        return squares.sum(dim=1, keepdim=True).sqrt_()
    return torch.linalg.vector_norm(h, dim=1, keepdim=True, dtype=torch.float32)


def add_linear_(x: Tensor, h: Tensor, weight: Tensor) -> None:
    """x += weight · h.  x: (B, N, C), h: (B, N, K), weight: (C, K)"""
    x.flatten(0, 1).addmm_(h.flatten(0, 1), weight.T)


def modulate_(x: Tensor, scale_shift: Tensor) -> None:
    """x = x · (1 + scale) + shift.  scale_shift: (2C,) float32"""
    scale, shift = scale_shift.to(x.dtype).chunk(2)
    torch.addcmul(shift, x, 1 + scale, out=x)


def modulate_norm_(x: Tensor, scale_shift: Tensor, bias: Tensor, eps: float = EPS) -> Tensor:
    """x = x · (1 + scale) + shift; returns its LayerNorm and adds `bias` (C,) to x."""
    modulate_(x, scale_shift)
    h = norm(x, eps)
    x.add_(bias.to(x.dtype))
    return h


def attention(qkv: Tensor, key: Tensor, value: Tensor, heads: int, self_attn: bool) -> Tensor:
    """Attention to the tokens themselves (where `self_attn`) and to the conditioning.

    qkv: (B, N, 3C), queries, keys and values side by side; key, value: (B, T, C) -> (B, N, C)
    """
    q, k, v = qkv.chunk(3, dim=-1)
    if self_attn:
        key, value = torch.cat([k, key], dim=1), torch.cat([v, value], dim=1)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
