"""Flash attention (arXiv 2307.08691) of tokens to themselves and to the conditioning, whose keys and values are cached.

Softmax is online, in float32, on logits in units of log 2. Each of the two sources of keys is read in full blocks
without masks; its remainder is one smaller block with a mask.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, tensor_descriptor
from .quantise import power_of_two

MIN_KEYS = 16  # in a block: the smallest dimension of tl.dot


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
    x_scale: float = 1.0,
    row_scale: Tensor | None = None,
    peak: Tensor | None = None,
) -> Tensor:
    """out = softmax(q · keysᵀ / √d) · values / x_scale; keys: of all positions (where `self_attn`), then the T cached.

    qkv: (B, N, 3C), queries, keys and values side by side, each with its heads side by side; k_cond, v_cond:
    (B, T, C), of the same strides, channels contiguous; out: (B, N, C). Head width d = C / heads: 16, 32, 64 or 128

    tma: load the tokens' keys and values with the tensor memory accelerator (compute capability 9 and up).
    registers: the limit per thread, which raises occupancy.
    row_scale (B · N,) float32: takes the scales of the rows where `out` is in e4m3; peak: (1,) float32, a bound of all
    values' magnitudes and so of their weighted means
    """
    batch, n, channels = out.shape
    width = channels // heads
    if qkv.dtype == torch.float32:  # only for comparisons: fits shared memory, is not tuned
        block_m, block_n, num_stages = 32, 32, 2
    elif width > 64:  # keys and values in flight have to fit shared memory
        num_stages = min(num_stages, 2)
    self_keys, cond_keys = n if self_attn else 0, k_cond.shape[1]
    grid = (triton.cdiv(n, block_m), heads, batch)
    options = {"maxnreg": registers} if registers else {}
    launch(_attention, grid)(
        qkv,
        tensor_descriptor(qkv.flatten(0, 1), block_n, width) if tma else None,
        k_cond,
        v_cond,
        out,
        row_scale,
        peak,
        n,
        self_keys,
        cond_keys,
        k_cond.stride(0),
        k_cond.stride(1),
        math.log2(math.e) / math.sqrt(width),
        channels,
        width,
        block_m,
        block_n,
        _last_block(self_keys, block_n),
        _last_block(cond_keys, block_n),
        "ieee",
        x_scale,
        num_warps=num_warps,
        num_stages=num_stages,
        **options,
    )
    return out


def _last_block(keys: int, block: int) -> int:
    """Size of the masked block for the keys that full blocks leave over, or 0."""
    rest = keys % block
    return max(MIN_KEYS, triton.next_power_of_2(rest)) if rest else 0


@triton.jit
def load_block(
    keys, values, first, count, stride, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr
):
    """Keys (D, BLOCK_N) and values (BLOCK_N, D) from `first` on, zeros beyond `count` where MASKED.

    keys, values: pointers to one head of (count, ·) rows
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
    """The state after a block of keys; where MASKED, only the first `count` keys are used.

    state: weighted sum of values (BLOCK_M, D), highest logit and sum of weights (BLOCK_M,) so far
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
    descriptor,
    top,
    left,
    channels: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LAST: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state after all keys of one source. LAST: size of the masked last block, 0 for none.

    descriptor: None, or the TMA descriptor of a matrix with the keys from (top, left) on and the values `channels`
    columns further
    """
    full = count // BLOCK_N * BLOCK_N
    for first in range(0, full, BLOCK_N):
        if descriptor is not None:
            k = descriptor.load([top + first, left]).T
            v = descriptor.load([top + first, left + channels])
        else:
            k, v = load_block(keys, values, first, count, stride, BLOCK_N, False, D)
        state = attend(state, q, k, v, scale, BLOCK_N, BLOCK_N, False, PRECISION)
    if LAST > 0:
        k, v = load_block(keys, values, full, count, stride, LAST, True, D)
        state = attend(state, q, k, v, scale, count - full, LAST, True, PRECISION)
    return state


@triton.jit(do_not_specialize=["n", "self_keys", "cond_keys"])
def _attention(
    qkv,
    descriptor,
    k_cond,
    v_cond,
    out,
    row_scale,
    value_peak,
    n,
    self_keys,
    cond_keys,
    cond_image,
    cond_row,
    scale,
    channels: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SELF_LAST: tl.constexpr,
    COND_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    X_SCALE: tl.constexpr,
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
        state, q, qkv + channels, qkv + 2 * channels, self_keys, 3 * channels, scale,
        descriptor, tl.program_id(2) * n, channels + head, channels, BLOCK_N, SELF_LAST, D, PRECISION,
    )  # fmt: skip
    keys, values = k_cond + image * cond_image + head, v_cond + image * cond_image + head
    state = attend_all(
        state, q, keys, values, cond_keys, cond_row, scale,
        None, 0, 0, channels, BLOCK_N, COND_LAST, D, PRECISION,
    )  # fmt: skip
    total, peak, weight = state
    total = total / weight[:, None] * (1.0 / X_SCALE)
    if row_scale is not None:  # one for all heads of a row, though other programs compute them
        row_factor, inverse = power_of_two(tl.load(value_peak) * (1.0 / X_SCALE))
        total *= inverse
        row_at = row_scale + tl.program_id(2) * n + row
        tl.store(row_at, tl.zeros_like(peak) + row_factor, mask=(row < n) & (tl.program_id(1) == 0))
    pointers = out + (image * n + row[:, None]) * channels + head + d[None, :]
    tl.store(pointers, total.to(out.dtype.element_ty), mask=present)
