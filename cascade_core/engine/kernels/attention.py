"""Flash attention (arXiv 2307.08691) of tokens to themselves and to the conditioning, whose keys and values are cached.

Softmax runs online in float32, on logits in units of log 2. Keys come in full blocks without masks; what is left of
each of the two sources is one last, smaller block with a mask.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import described, launch

SMALLEST = 16  # keys that a product takes at least


def attention(
    qkv: Tensor,
    k_cond: Tensor,
    v_cond: Tensor,
    heads: int,
    out: Tensor,
    self_attn: bool = True,
    block_m: int = 64,
    block_n: int = 64,
    num_warps: int = 4,
    num_stages: int = 3,
    tma: bool = False,
    registers: int | None = None,
) -> Tensor:
    """out = softmax(q · keysᵀ / √d) · values; keys: those of all positions (where `self_attn`), then the T cached ones.

    qkv: (B, N, 3C), queries, keys and values side by side, each with its heads side by side; k_cond, v_cond:
    (B, T, C), of the same strides, channels contiguous; out: (B, N, C). Head width d = C / heads: 16, 32, 64 or 128

    tma: the tokens' keys and values are loaded by the tensor memory accelerator (compute capability 9 and up).
    registers: of a thread at most, so that more programs run beside each other.
    """
    batch, n, channels = out.shape
    width = channels // heads
    if qkv.dtype == torch.float32:  # for comparisons: what fits a multiprocessor's memory, not what is fast
        block_m, block_n, num_stages = 32, 32, 2
    elif width > 64:  # so that keys and values under way fit
        num_stages = min(num_stages, 2)
    own, cached = n if self_attn else 0, k_cond.shape[1]
    grid = (triton.cdiv(n, block_m), heads, batch)
    options = {"maxnreg": registers} if registers else {}
    launch(_attention, grid)(
        qkv,
        described(qkv.flatten(0, 1), block_n, width) if tma else None,
        k_cond,
        v_cond,
        out,
        n,
        own,
        cached,
        k_cond.stride(0),
        k_cond.stride(1),
        math.log2(math.e) / math.sqrt(width),
        channels,
        width,
        block_m,
        block_n,
        _last_block(own, block_n),
        _last_block(cached, block_n),
        "ieee",
        num_warps=num_warps,
        num_stages=num_stages,
        **options,
    )
    return out


def _last_block(keys: int, block: int) -> int:
    """Size of the block for what full blocks leave of the keys; 0: nothing is left."""
    rest = keys % block
    return max(SMALLEST, triton.next_power_of_2(rest)) if rest else 0


@triton.jit
def load_block(
    keys, values, first, count, stride, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr
):
    """Keys (D, BLOCK_N) and values (BLOCK_N, D) from `first` on, zeros beyond `count` where MASKED.

    keys, values point to one head of (count, ·) rows.
    """
    key, d = first + tl.arange(0, BLOCK_N), tl.arange(0, D)
    if MASKED:
        k = tl.load(keys + key[None, :] * stride + d[:, None], mask=key[None, :] < count, other=0.0)
        v = tl.load(values + key[:, None] * stride + d[None, :], mask=key[:, None] < count, other=0.0)
    else:
        k = tl.load(keys + key[None, :] * stride + d[:, None])
        v = tl.load(values + key[:, None] * stride + d[None, :])
    return k, v


@triton.jit
def attend(
    state, q, k, v, scale, count, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr
):
    """The state after a block of keys, the first `count` of them where MASKED.

    state: values' sum (BLOCK_M, D), highest logit and sum of weights (BLOCK_M,) so far
    """
    total, peak, weight = state
    logits = tl.dot(q, k, input_precision=PRECISION)
    if MASKED:
        logits = tl.where(tl.arange(0, BLOCK_N)[None, :] < count, logits, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(logits, axis=1) * scale)
    share = tl.exp2(logits * scale - new_peak[:, None])
    fade = tl.exp2(peak - new_peak)
    weight = weight * fade + tl.sum(share, axis=1)
    total = tl.dot(share.to(v.dtype), v, total * fade[:, None], input_precision=PRECISION)
    return total, new_peak, weight


@triton.jit
def attend_all(
    state,
    q,
    keys,
    values,
    count,
    stride,
    scale,
    described,
    top,
    left,
    channels: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LAST: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state after all keys of one source, the last LAST of them (0: none) in a block of their own.

    described: the descriptor of a matrix that has the keys from (top, left) on and the values `channels` further, or
    None
    """
    full = count // BLOCK_N * BLOCK_N
    for first in range(0, full, BLOCK_N):
        if described is not None:
            k = described.load([top + first, left]).T
            v = described.load([top + first, left + channels])
        else:
            k, v = load_block(keys, values, first, count, stride, BLOCK_N, False, D)
        state = attend(state, q, k, v, scale, BLOCK_N, BLOCK_N, False, PRECISION)
    if LAST > 0:
        k, v = load_block(keys, values, full, count, stride, LAST, True, D)
        state = attend(state, q, k, v, scale, count - full, LAST, True, PRECISION)
    return state


@triton.jit(do_not_specialize=["n", "own", "cached"])
def _attention(
    qkv,
    described,
    k_cond,
    v_cond,
    out,
    n,
    own,
    cached,
    cond_image,
    cond_row,
    scale,
    channels: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OWN_LAST: tl.constexpr,
    CACHED_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, image = tl.program_id(1) * D, tl.program_id(2).to(tl.int64)
    row, d = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, D)
    present = row[:, None] < n
    qkv += image * n * (3 * channels) + head
    q = tl.load(qkv + row[:, None] * (3 * channels) + d[None, :], mask=present, other=0.0)
    total = tl.zeros((BLOCK_M, D), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    weight = tl.zeros((BLOCK_M,), tl.float32)
    state = (total, peak, weight)
    state = attend_all(
        state, q, qkv + channels, qkv + 2 * channels, own, 3 * channels, scale,
        described, tl.program_id(2) * n, channels + head, channels, BLOCK_N, OWN_LAST, D, PRECISION,
    )  # fmt: skip
    keys, values = k_cond + image * cond_image + head, v_cond + image * cond_image + head
    state = attend_all(
        state, q, keys, values, cached, cond_row, scale,
        None, 0, 0, channels, BLOCK_N, CACHED_LAST, D, PRECISION,
    )  # fmt: skip
    total, peak, weight = state
    total = total / weight[:, None]
    here = out + (image * n + row[:, None]) * channels + head + d[None, :]
    tl.store(here, total.to(out.dtype.element_ty), mask=present)
