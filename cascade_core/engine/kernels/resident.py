"""GELU and global response norm in one launch, for feature maps that fit the registers of the whole device.

A program keeps all positions of one image for a stripe of channels in registers, two 16-bit values in each, so that h
is read once and written once. A stripe consists of a main part and optionally a rest, both powers of two, which allows
more widths. Every channel's norm is then local to one program; only the mean of all norms needs a reduction over the
grid: each program stores its partial sum in a workspace and waits until all have done so.

Waiting requires all programs to be resident at once: `plan` counts registers, and a cooperative launch fails, rather
than hangs, where they do not fit. No other kernel with a grid-wide barrier may run at the same time.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..card import card_of
from .launch import launch
from .quantise import power_of_two
from .response import EPS, gelu_of_fraction, response_share

# Channels of the main part and of the rest.
STRIPES = (
    (128, 0),
    (64, 32),
    (64, 16),
    (64, 0),
    (32, 16),
    (32, 0),
)
WARPS = (16, 8, 4)
REGISTERS = 65536  # of a multiprocessor
THREADS = 2048  # resident on a multiprocessor at most
ROWS = 64  # positions of a tile of the main part; a tile of the rest has as many elements
OVERHEAD = 48  # registers a thread needs beside the feature map
ROUND = tl.constexpr(1 << 16)  # by which each launch advances the arrival counters
SCALE_ROWS = tl.constexpr(256)  # stored at a time
SUMS = 3  # of each program at most: see `grid_sum` and `grid_peak`


class Plan(NamedTuple):
    """The division of one launch into programs."""

    main: int  # channels of a stripe
    rest: int  # channels of the rest, or 0
    num_warps: int
    registers: int  # limit per thread with which all programs are resident

    @property
    def channels(self) -> int:
        return self.main + self.rest

    def rest_rows(self) -> int:
        """Positions of a tile of the rest."""
        return ROWS * self.main // self.rest if self.rest else 1

    def tiles(self, n: int) -> tuple[int, int]:
        """Tiles of the main part and of the rest, for n positions."""
        return triton.cdiv(n, ROWS), triton.cdiv(n, self.rest_rows()) if self.rest else 0

    def data_registers(self, n: int) -> int:
        """Registers per thread that hold the feature map of n positions."""
        return triton.cdiv(sum(self.tiles(n)) * ROWS * self.main // 2, 32 * self.num_warps)


@lru_cache
def plan(batch: int, n: int, k: int, multiprocessors: int) -> Plan | None:
    """The division of h (batch, n, k) that keeps most multiprocessors busy, or None where h does not fit."""
    best, best_busy = None, 0.0
    for main, rest in STRIPES:
        share = triton.cdiv(batch * triton.cdiv(k, main + rest), multiprocessors)
        busy = batch * k / ((main + rest) * share * multiprocessors)
        for warps in WARPS:
            threads = 32 * warps
            limit = min(248, REGISTERS // (share * threads) // 8 * 8)
            division = Plan(main, rest, warps, limit)
            if (
                share * threads <= THREADS
                and division.data_registers(n) + OVERHEAD <= limit
                and busy > best_busy
            ):
                best, best_busy = division, busy
    return best


def fits(h: Tensor) -> bool:
    """Whether `gelu_response_norm` can take h (B, N, K)."""
    return h.element_size() == 2 and h.shape[2] % 2 == 0 and _plan_of(h) is not None


def response_workspace(batch: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Partial sums and arrival counters for up to `batch` images of k channels; every launch may share them."""
    stripes = triton.cdiv(k, min(map(sum, STRIPES)))
    sums = torch.empty(batch, SUMS * stripes, dtype=torch.float32, device=device)
    return sums, torch.zeros(batch, dtype=torch.int64, device=device)


def gelu_response_norm(
    h: Tensor,
    gamma: Tensor,
    workspace: tuple[Tensor, Tensor],
    h_scale: float = 1.0,
    x_scale: float = 1.0,
    out8: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """h = GELU(h) · (1 + gamma · r / (mean_K(r) + ε)), r: norms of GELU(h) over N.

    h: (B, N, K) for which `fits`, divided by h_scale before and by x_scale after, gamma: (K,),
    workspace: `response_workspace` of this device, on one stream at a time
    out8 (B, N, K) e4m3, row_scale (B · N,) float32: receive the result if they are given, and h is left unchanged.
    All rows of an image have the same scale, a bound of its values: no program sees a whole row
    """
    batch, n, k = h.shape
    division = _plan_of(h)
    assert division is not None, "gelu_response_norm was called with a feature map that does not fit."
    sums, arrivals = workspace
    stripes = triton.cdiv(k, division.channels)
    launch(_gelu_response_norm, (stripes, batch))(
        h.view(torch.int32),
        None if out8 is None else out8.view(torch.int16),
        row_scale,
        gamma,
        sums,
        arrivals,
        n,
        EPS / h_scale,
        k,
        division.main // 2,
        division.rest // 2,
        ROWS,
        division.rest_rows(),
        *division.tiles(n),
        triton.next_power_of_2(stripes),
        tl.bfloat16 if h.dtype == torch.bfloat16 else tl.float16,
        triton.knobs.runtime.interpret,
        h_scale,
        h_scale / x_scale,
        num_warps=division.num_warps,
        maxnreg=division.registers,
        launch_cooperative_grid=True,
    )
    return h if out8 is None else out8


def _plan_of(h: Tensor) -> Plan | None:
    batch, n, k = h.shape
    card = card_of(h.device)
    return plan(batch, n, k, card.multiprocessors if card else 1)  # without a card: interpreted


@triton.jit
def unpack(pair, DTYPE: tl.constexpr):
    """Two 16-bit values from int32, as float32; the first is in the lower bits."""
    if tl.bfloat16 == DTYPE:  # one instruction each, where the compiler's conversion takes three for both
        return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
    low = (pair & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)
    high = (pair >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def opaque(pair, INTERPRETED: tl.constexpr):
    """Identity that the compiler cannot see through, so it keeps the one packed register, not the two halves."""
    if not INTERPRETED:
        pair = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [pair], tl.int32, is_pure=False, pack=1)
    return pair


@triton.jit
def pack(low, high, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Two float32 values as one int32, rounded to DTYPE, in one instruction."""
    if INTERPRETED:
        low_bits = low.to(DTYPE).to(tl.uint16, bitcast=True).to(tl.int32)
        high_bits = high.to(DTYPE).to(tl.uint16, bitcast=True).to(tl.int32)
        pair = low_bits | (high_bits << 16)
    elif tl.bfloat16 == DTYPE:
        pair = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", [high, low], tl.int32, is_pure=False, pack=1
        )
    else:
        # Compiled to one instruction from 8.0 on too; in this form it also assembles for older cards.
        pair = tl.inline_asm_elementwise(
            "{.reg .b16 l, h; cvt.rn.f16.f32 h, $1; cvt.rn.f16.f32 l, $2; mov.b32 $0, {l, h};}",
            "=r,f,f", [high, low], tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    return pair


@triton.jit
def grid_sum(value, sums, arrivals, SLOTS: tl.constexpr):
    """The sum of `value` over the programs of grid axis 0, added in the same order by each of them.

    Every launch adds ROUND to `arrivals`, whatever its number of programs, so the counter needs no reset.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    tl.store(sums + program, value)
    tl.debug_barrier()
    step = tl.where(program == 0, ROUND - programs + 1, 1).to(tl.int64)
    arrived = tl.atomic_add(arrivals, step, sem="acq_rel", scope="gpu")
    goal = (arrived // ROUND + 1) * ROUND
    arrived += step
    while arrived < goal:
        arrived = tl.atomic_add(arrivals, tl.zeros_like(step), sem="acquire", scope="gpu")
    slot = tl.arange(0, SLOTS)
    return tl.sum(tl.load(sums + slot, mask=slot < programs, other=0.0, cache_modifier=".cg"))


@triton.jit
def grid_peak(peaks, SLOTS: tl.constexpr):
    """The largest of the values that the programs of grid axis 0 stored at peaks + program before `grid_sum`."""
    slot = tl.arange(0, SLOTS)
    present = slot < tl.num_programs(0)
    return tl.max(tl.load(peaks + slot, mask=present, other=0.0, cache_modifier=".cg"))


@triton.jit
def larger(pair, other, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """The larger of two 16-bit values in each half of an int32, in one instruction."""
    if INTERPRETED:
        low, high = unpack(pair, DTYPE)
        other_low, other_high = unpack(other, DTYPE)
        pair = pack(tl.maximum(low, other_low), tl.maximum(high, other_high), DTYPE, INTERPRETED)
    elif tl.bfloat16 == DTYPE:
        pair = tl.inline_asm_elementwise(
            "max.bf16x2 $0, $1, $2;", "=r,r,r", [pair, other], tl.int32, is_pure=True, pack=1
        )
    else:
        pair = tl.inline_asm_elementwise(
            "max.f16x2 $0, $1, $2;", "=r,r,r", [pair, other], tl.int32, is_pure=True, pack=1
        )
    return pair


@triton.jit
def pack8(low, high, INTERPRETED: tl.constexpr):
    """Two float32 values as e4m3 in one int16; the first is in the lower bits."""
    if INTERPRETED:
        low_bits = low.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int16)
        high_bits = high.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int16)
        pair = low_bits | (high_bits << 8)
    else:
        pair = tl.inline_asm_elementwise(
            "cvt.rn.satfinite.e4m3x2.f32 $0, $1, $2;", "=h,f,f", [high, low], tl.int16, is_pure=True, pack=1
        )
    return pair


@triton.jit
def load_activated(
    h,
    n,
    pair,
    k: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    H_SCALE: tl.constexpr,
):
    """GELU of columns `pair` (1, PAIRS) of an image h (n, k / 2) -> its tiles, and both halves' norms (1, PAIRS)"""
    row = tl.arange(0, ROWS)[:, None]
    inside = pair < k // 2
    pointers = h + (row * (k // 2) + pair)
    tiles = ()
    low_sum = tl.zeros((ROWS, PAIRS), tl.float32)
    high_sum = tl.zeros((ROWS, PAIRS), tl.float32)
    for tile in tl.static_range(TILES):
        pairs = tl.zeros((ROWS, PAIRS), tl.int32)
        # Always true, but the compiler cannot know that. So it finishes tile by tile; otherwise it would leave all
        # rounding for the end, and run out of registers.
        if tile * ROWS < n:
            # Only the last tile may be short. Addresses are one base plus constants, to save registers.
            present = inside & (row < n - tile * ROWS) if tile == TILES - 1 else inside & (row >= 0)
            low, high = unpack(tl.load(pointers + tile * ROWS * (k // 2), mask=present, other=0), DTYPE)
            low, high = gelu_of_fraction(low, H_SCALE), gelu_of_fraction(high, H_SCALE)
            pairs = pack(low, high, DTYPE, INTERPRETED)
            low, high = unpack(pairs, DTYPE)
            low_sum += low * low
            high_sum += high * high
        tiles = tiles + (opaque(pairs, INTERPRETED),)  # noqa: RUF005
    low_r = tl.sqrt(tl.sum(low_sum, axis=0, keep_dims=True))
    high_r = tl.sqrt(tl.sum(high_sum, axis=0, keep_dims=True))
    return tiles, low_r, high_r


@triton.jit
def response_peaks(
    tiles,
    low_r,
    high_r,
    gamma,
    pair,
    k: tl.constexpr,
    TILES: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    H_SCALE: tl.constexpr,
):
    """Bounds of |h| and |h · gamma| · r over the tiles of `load_activated`."""
    pairs = tiles[0]
    for tile in tl.static_range(1, TILES):
        pairs = larger(pairs, tiles[tile], DTYPE, INTERPRETED)
    low, high = unpack(pairs, DTYPE)
    least = 0.17 / H_SCALE  # no GELU is below −0.17
    low_peak = tl.maximum(tl.max(low, axis=0, keep_dims=True), least)
    high_peak = tl.maximum(tl.max(high, axis=0, keep_dims=True), least)
    inside = pair < k // 2
    low = tl.abs(tl.load(gamma + 2 * pair, mask=inside, other=0.0).to(tl.float32)) * low_r * low_peak
    high = tl.abs(tl.load(gamma + 2 * pair + 1, mask=inside, other=0.0).to(tl.float32)) * high_r * high_peak
    return tl.max(tl.maximum(low_peak, high_peak)), tl.max(tl.maximum(low, high))


@triton.jit
def store_normalised(
    h,
    tiles,
    low_r,
    high_r,
    gamma,
    mean,
    eps,
    n,
    pair,
    k: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    FACTOR: tl.constexpr,
    inverse,
):
    """Stores the tiles of `load_activated` times their response norm and FACTOR.

    inverse: None, or the inverse of the scale of e4m3, in which they are stored
    """
    row = tl.arange(0, ROWS)[:, None]
    inside = pair < k // 2
    pointers = h + (row * (k // 2) + pair)
    low_gamma = tl.load(gamma + 2 * pair, mask=inside, other=0.0).to(tl.float32)
    high_gamma = tl.load(gamma + 2 * pair + 1, mask=inside, other=0.0).to(tl.float32)
    low_share = response_share(low_r, low_gamma, mean, eps, FACTOR)
    high_share = response_share(high_r, high_gamma, mean, eps, FACTOR)
    if inverse is not None:
        low_share *= inverse
        high_share *= inverse
    for tile in tl.static_range(TILES):
        present = inside & (row < n - tile * ROWS) if tile == TILES - 1 else inside & (row >= 0)
        low, high = unpack(tiles[tile], DTYPE)
        if inverse is None:
            pairs = pack(low * low_share, high * high_share, DTYPE, INTERPRETED)
        else:
            pairs = pack8(low * low_share, high * high_share, INTERPRETED)
        tl.store(pointers + tile * ROWS * (k // 2), pairs, mask=present)


@triton.jit(do_not_specialize=["n"])
def _gelu_response_norm(
    h,
    out8,
    row_scale,
    gamma,
    sums,
    arrivals,
    n,
    eps,
    k: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    REST_ROWS: tl.constexpr,
    TILES: tl.constexpr,
    REST_TILES: tl.constexpr,
    SLOTS: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    H_SCALE: tl.constexpr,
    FACTOR: tl.constexpr,
):
    image, programs = tl.program_id(1), tl.num_programs(0)
    start = image.to(tl.int64) * n * (k // 2)
    h += start
    sums += image * (programs if out8 is None else 3 * programs)
    first = tl.program_id(0) * (MAIN + REST)
    pair = first + tl.arange(0, MAIN)[None, :]
    QUANTISE: tl.constexpr = out8 is not None
    tiles, low_r, high_r = load_activated(h, n, pair, k, MAIN, ROWS, TILES, DTYPE, INTERPRETED, H_SCALE)
    norms = tl.sum(low_r + high_r)
    if QUANTISE:
        peak, response_peak = response_peaks(
            tiles, low_r, high_r, gamma, pair, k, TILES, DTYPE, INTERPRETED, H_SCALE
        )
    if REST > 0:
        rest_pair = first + MAIN + tl.arange(0, REST)[None, :]
        rest_tiles, low_rest, high_rest = load_activated(
            h, n, rest_pair, k, REST, REST_ROWS, REST_TILES, DTYPE, INTERPRETED, H_SCALE
        )
        norms += tl.sum(low_rest + high_rest)
        if QUANTISE:
            rest_peak, rest_response = response_peaks(
                rest_tiles, low_rest, high_rest, gamma, rest_pair, k, REST_TILES, DTYPE, INTERPRETED, H_SCALE
            )
            peak, response_peak = tl.maximum(peak, rest_peak), tl.maximum(response_peak, rest_response)

    if QUANTISE:
        tl.store(sums + programs + tl.program_id(0), peak)
        tl.store(sums + 2 * programs + tl.program_id(0), response_peak)
    mean = grid_sum(norms, sums, arrivals + image, SLOTS) / k
    target, inverse = h, None
    if QUANTISE:
        # |h · (1 + gamma · r / (mean + ε))| ≤ |h| + |h · gamma · r| / (mean + ε)
        peak = grid_peak(sums + programs, SLOTS) + grid_peak(sums + 2 * programs, SLOTS) / (mean + eps)
        scale, inverse = power_of_two(peak * FACTOR)
        target = out8 + start
        # Each program stores the scales of a part of the rows.
        for row in range(tl.program_id(0) * SCALE_ROWS, n, programs * SCALE_ROWS):
            rows = row + tl.arange(0, SCALE_ROWS)
            scales = tl.zeros((SCALE_ROWS,), tl.float32) + scale
            tl.store(row_scale + image * n + rows, scales, mask=rows < n)
    store_normalised(
        target, tiles, low_r, high_r, gamma, mean, eps, n, pair,
        k, ROWS, TILES, DTYPE, INTERPRETED, FACTOR, inverse,
    )  # fmt: skip
    if REST > 0:
        store_normalised(
            target, rest_tiles, low_rest, high_rest, gamma, mean, eps, n, rest_pair,
            k, REST_ROWS, REST_TILES, DTYPE, INTERPRETED, FACTOR, inverse,
        )  # fmt: skip
