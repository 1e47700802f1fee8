"""The operations of the engine, in plain PyTorch; `cuda.py` implements the same protocol in fused kernels.

Feature maps are tokens: (B, N, C) contiguous, N = height · width. A trailing underscore: the first argument is changed
in place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..networks.fp16 import divide, divide_, divided_gelu_
from .layout import concatenated

EPS = 1e-6  # of every LayerNorm in the networks
RESPONSE_EPS = 1e-6


class Operations(Protocol):
    """Interface of a module of operations; the functions below document each.

    A weight is a Tensor, or a QuantisedWeight in one of `formats`; several side by side may be a list. Values that
    only products read (a normed feature map, or attention's result) may be in a form of the module's own (fp8.py).
    """

    @property
    def formats(self) -> Collection[torch.dtype]:
        """The 8-bit formats of weights that the blocks' products take undequantised."""
        ...

    @property
    def resample_by_products(self) -> bool:
        """Whether the convolutions between levels are computed as products, in the workspace alone."""
        ...

    def compile_ahead(self, forward: Callable[[], object]) -> None: ...

    def can_capture(self, device: torch.device) -> bool: ...

    def norm(self, x: Tensor, eps: float) -> Tensor: ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    def depthwise_norm(
        self, x: Tensor, size: tuple[int, int], weight: Tensor, bias: Tensor, eps: float, joins: bool = False
    ) -> Any: ...

    def project(self, x: Any, weight: Any, bias: Tensor) -> Tensor: ...

    def channelwise_(
        self,
        x: Tensor,
        h: Any,
        expand: Any,
        bias: Tensor,
        gamma: Tensor,
        contract: Any,
        h_scale: float = 1.0,
        x_scale: float = 1.0,
    ) -> None: ...

    def add_linear_(self, x: Tensor, h: Any, weight: Any) -> None: ...

    def modulate_(self, x: Tensor, scale_shift: Tensor) -> None: ...

    def modulate_norm_(self, x: Tensor, scale_shift: Tensor, bias: Tensor, eps: float) -> Any: ...

    def attention(
        self,
        qkv: Tensor,
        key: Tensor,
        value: Tensor,
        heads: int,
        self_attn: bool,
        x_scale: float = 1.0,
        peak: Tensor | None = None,
    ) -> Any: ...


formats: Collection[torch.dtype] = ()
resample_by_products = False


def compile_ahead(forward: Callable[[], object]) -> None:
    """Does nothing: plain PyTorch has no kernels to compile."""


def can_capture(device: torch.device) -> bool:
    """Whether forwards can be captured as CUDA graphs: not these, which allocate mostly outside the workspace."""
    return False


def keep_freed_memory() -> None:
    """Makes the C library reuse freed memory, in blocks of up to 31 MB.

    By default it returns a feature map's memory to the system, which zeroes the pages of the next one: up to half of a
    block's time. glibc's threshold is the largest block of up to 32 MB freed so far (mallopt(3), M_MMAP_THRESHOLD), so
    one is allocated and freed here, without writing to it.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def norm(x: Tensor, eps: float = EPS) -> Tensor:
    """LayerNorm over the channels, without weights."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, N, C) -> (B, N, C_out)"""
    return F.linear(x, weight, bias)


def depthwise_norm(
    x: Tensor, size: tuple[int, int], weight: Tensor, bias: Tensor, eps: float = EPS, joins: bool = False
) -> Tensor:
    """LayerNorm of a depthwise 3×3 convolution.  x: (B, N, C) at `size`, weight: (9, C) -> (B, N, C)

    joins: return a Tensor, because it will be concatenated
    """
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
    widths = [len(rows) for rows in weight]
    parts = zip(out.split(widths, dim=-1), weight, bias.split(widths), strict=True)
    for part, rows, part_bias in parts:
        part.copy_(F.linear(x, rows, part_bias))
    return out


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
    """x += contract · response_norm(GELU(expand · h + bias)), the MLP of a residual block without its last biases.

    x: (B, N, C), h: (B, N, C or C + C_skip), expand: (4C, …), gamma: (4C,), contract: (C, 4C)
    h_scale, x_scale: powers of two by which h with its bias, and x, are divided (networks/fp16.py)
    """
    h = F.linear(h, expand, bias)
    # in place: on a CPU memory is the bottleneck
    h = torch.ops.aten.gelu_(h) if h_scale == 1 else divided_gelu_(h, h_scale)
    response = _channel_norm(h)
    share = response / (response.mean(dim=-1, keepdim=True) + RESPONSE_EPS / h_scale)
    gain = divide(1 + gamma * share, x_scale / h_scale)
    add_linear_(x, h.mul_(gain.to(h.dtype)), contract)


def _channel_norm(h: Tensor) -> Tensor:
    """L2 norm of each channel over all positions.  (B, N, C) -> (B, 1, C) float32"""
    if h.device.type == "cpu":  # vector_norm takes six times as long there, except along the last dimension
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


def attention(
    qkv: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    self_attn: bool,
    x_scale: float = 1.0,
    peak: Tensor | None = None,
) -> Tensor:
    """Attention to the tokens themselves (where `self_attn`) and to the conditioning.

    qkv: (B, N, 3C), queries, keys and values side by side; key, value: (B, T, C) -> (B, N, C), divided by x_scale
    peak: (1,) float32, a bound of the magnitudes of all values, or None
    """
    q, k, v = qkv.chunk(3, dim=-1)
    if self_attn:
        key, value = concatenated(k, key, dim=1), concatenated(v, value, dim=1)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, key, value))
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return divide_(attended, x_scale)
