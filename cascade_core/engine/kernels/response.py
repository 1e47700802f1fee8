"""GELU and global response norm (ConvNeXt V2, section 3.2) over the hidden width of a residual block's MLP.

h · (1 + gamma · r / (mean_K(r) + ε)), r: the norm of each channel over the positions of one image. beta is folded into
the next layer's bias.

Three launches for any size, or one where h fits the registers of the whole device (`resident.py`). Sums are added in a
fixed order, so results are deterministic.

For fp16 (`networks/fp16.py`), h may come divided by h_scale, and the result be divided by x_scale, both powers of two.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .matmul import gelu

EPS = 1e-6
BLOCK_K = 256  # channels of a program
BLOCK_N = 16  # positions per step of a program
PROGRAMS = 256  # per image at least: with two images about four on every multiprocessor
SCALE_ELEMENTS = 32768  # partial sums that a program of `response_scale` adds at a time


def response_chunks(n: int, k: int) -> int:
    """The number of chunks into which `gelu_response` divides n positions of k channels: the size of `partial`."""
    wanted = triton.cdiv(PROGRAMS, triton.cdiv(k, BLOCK_K))
    return triton.cdiv(n, _rows_per_chunk(n, wanted))


def _rows_per_chunk(n: int, chunks: int) -> int:
    return triton.cdiv(triton.cdiv(n, chunks), BLOCK_N) * BLOCK_N


def gelu_response(h: Tensor, partial: Tensor, h_scale: float = 1.0) -> Tensor:
    """h = GELU(h), exact; partial = sums of its squares over chunks of positions.

    h: (B, N, K), divided by h_scale before and after, partial: (B, response_chunks(N, K), K) float32
    """
    batch, n, k = h.shape
    chunks = partial.shape[1]
    grid = (triton.cdiv(k, BLOCK_K), chunks, batch)
    rows = _rows_per_chunk(n, chunks)
    launch(_gelu_response, grid)(h, partial, n, rows, k, BLOCK_N, BLOCK_K, h_scale)
    return h


def response_scale(
    partial: Tensor, gamma: Tensor, scale: Tensor, h_scale: float = 1.0, x_scale: float = 1.0
) -> Tensor:
    """scale = 1 + gamma · r / (mean_K(r) + ε), r = √(sum of partial): times h_scale / x_scale.

    partial: (B, chunks, K) float32, of h / h_scale, gamma: (K,), scale: (B, K) float32
    """
    batch, chunks, k = partial.shape
    block = triton.next_power_of_2(k)
    rows = min(triton.next_power_of_2(chunks), max(1, SCALE_ELEMENTS // block))
    launch(_response_scale, (batch,))(
        partial, gamma, scale, chunks, EPS / h_scale, k, block, rows, h_scale / x_scale, num_warps=32
    )
    return scale


def apply_response(h: Tensor, scale: Tensor) -> Tensor:
    """h = h · scale, each image by its own.  h: (B, N, K), scale: (B, K) float32"""
    batch, n, k = h.shape
    grid = (triton.cdiv(k, BLOCK_K), triton.cdiv(n, 2 * BLOCK_N), batch)
    launch(_apply_response, grid)(h, scale, n, k, 2 * BLOCK_N, BLOCK_K)
    return h


@triton.jit
def response_share(r, gamma, mean, eps, FACTOR: tl.constexpr):
    """FACTOR times the factor of a channel with norm r, where the mean of all norms is `mean`."""
    return (1.0 + gamma * r / (mean + eps)) * FACTOR


@triton.jit
def gelu_of_fraction(x, SCALE: tl.constexpr):
    """GELU(SCALE · x) / SCALE, for a power of two."""
    return gelu(x * SCALE) * (1.0 / SCALE)


@triton.jit(do_not_specialize=["n", "rows"])
def _gelu_response(
    h,
    partial,
    n,
    rows,
    k: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    H_SCALE: tl.constexpr,
):
    chunk, image = tl.program_id(1), tl.program_id(2)
    c = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    start, end = chunk * rows, tl.minimum(chunk * rows + rows, n)
    h += image.to(tl.int64) * n * k
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for first in range(start, end, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)[:, None]
        present = (row < end) & (c < k)
        pointers = h + row.to(tl.int64) * k + c
        value = gelu_of_fraction(tl.load(pointers, mask=present, other=0.0).to(tl.float32), H_SCALE)
        tl.store(pointers, value.to(h.dtype.element_ty), mask=present)
        total += value * value
    sums = tl.sum(total, axis=0, keep_dims=True)
    tl.store(partial + (image * tl.num_programs(1) + chunk) * k + c, sums, mask=c < k)


@triton.jit(do_not_specialize=["chunks"])
def _response_scale(
    partial,
    gamma,
    scale,
    chunks,
    eps,
    k: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    FACTOR: tl.constexpr,
):
    image = tl.program_id(0)
    c = tl.arange(0, BLOCK_K)[None, :]
    inside = c < k
    total = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for first in range(0, chunks, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        total += tl.load(partial + (image * chunks + row) * k + c, mask=(row < chunks) & inside, other=0.0)
    r = tl.sqrt(tl.sum(total, axis=0, keep_dims=True))
    mean = tl.sum(r, axis=1, keep_dims=True) / k
    channel_gamma = tl.load(gamma + c, mask=inside, other=0.0).to(tl.float32)
    share = response_share(r, channel_gamma, mean, eps, FACTOR)
    tl.store(scale + image * k + c, share, mask=inside)


@triton.jit(do_not_specialize=["n"])
def _apply_response(
    h,
    scale,
    n,
    k: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    image = tl.program_id(2)
    c = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    present = (row < n) & (c < k)
    pointers = h + image.to(tl.int64) * n * k + row.to(tl.int64) * k + c
    share = tl.load(scale + image * k + c, mask=c < k, other=0.0)
    value = tl.load(pointers, mask=present, other=0.0).to(tl.float32) * share
    tl.store(pointers, value.to(h.dtype.element_ty), mask=present)
