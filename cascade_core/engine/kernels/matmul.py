"""One Triton matrix product, with what the networks do right before and after it as options.

    out = epilogue(prologue(x) · wᵀ + bias)        x: (M, K), w: (N, K), out: (M, N); float32 accumulators

Prologue: each channel of x times the scale that its image has for it; integer weights to x's type. Epilogue: scales
of the rows of x and of w, where these are quantised; GELU and the sums of squares that the global response norm
needs, or the sum with what `out` holds.

Rows are tokens; every image has `rows` of them. Sums of squares are per chunk of CHUNK rows of one image, where a
tile is one chunk or several. Where CHUNK does not divide `rows`, each image is padded to whole chunks (`padded` rows)
and tiles run over these, so that a tile may span images but a chunk never does.

A schedule says which program computes what:
`tile`  one program, one tile.
`loop`  as many programs as fit at once, each taking every n-th tile, so that loads run on while a tile ends.
"""

import triton
import triton.language as tl

TILE = tl.constexpr(0)
LOOP = tl.constexpr(1)
SCHEDULES = {"tile": TILE.value, "loop": LOOP.value}


@triton.jit
def gelu(x):
    """x · Φ(x) = max(x, 0) − |x| · Φ(−|x|), where −log2 Φ(−t) is 1 + t · (a polynomial), fitted on [0, 6].

    Off by at most 7e-7, and 7e-6 of the value down to −6 (float32 erf loses all of it there), for a third of the
    instructions of erf.
    """
    t = tl.abs(x)
    p = 1.7937805837825914e-06 * t - 6.072616488651226e-05
    p = p * t + 9.231857754731424e-04
    p = p * t - 8.476847485718695e-03
    p = p * t + 5.3890938804266125e-02
    p = p * t + 4.585415840721885e-01
    p = p * t + 1.1512143698094917
    return tl.maximum(x, 0.0) - t * tl.exp2(-(t * p + 1.0))


@triton.jit
def _position(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows of tiles at a time, so that programs that run together share operands."""
    per_group = GROUP * tiles_n
    first = (tile // per_group) * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    return first + (tile % per_group) % size, (tile % per_group) // size


@triton.jit
def _rows(tile_m, m, rows, padded, BLOCK_M: tl.constexpr, PADDED: tl.constexpr):
    """The rows of x that a tile holds, and which of them exist."""
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    if PADDED:
        image = row // padded
        local = row % padded
        row = image * rows + local
        return row, (local < rows) & (row < m)
    return row, row < m


@triton.jit
def _accumulate(
    x, w, scale, row, tile_m, tile_n, m, n, k, rows,
    SPANS: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums of one tile.

    SPANS: of how many images a tile's rows may be: 0 without scale, 1, 2, or 3 for any number.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    depth = tl.arange(0, BLOCK_K)
    row = tl.minimum(row, m - 1)  # what does not exist is computed from the last row and not stored
    if not TMA:
        column = tl.minimum(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), n - 1)
        x_at = x + row.to(tl.int64)[:, None] * k + depth[None, :]
        w_at = w + column.to(tl.int64)[None, :] * k + depth[:, None]
    image = row // rows
    lowest = tl.minimum(tile_m * BLOCK_M, m - 1) // rows
    highest = (tl.minimum(tile_m * BLOCK_M + BLOCK_M, m) - 1) // rows
    for step in range(tl.maximum(tl.cdiv(k, BLOCK_K), 1)):  # which tells the compiler that it runs
        at = step * BLOCK_K
        if TMA:
            a = x.load([tile_m * BLOCK_M, at])
            b = w.load([tile_n * BLOCK_N, at]).T
        elif EVEN_K:
            a = tl.load(x_at)
            b = tl.load(w_at)
        else:
            a = tl.load(x_at, mask=(at + depth)[None, :] < k, other=0.0)
            b = tl.load(w_at, mask=(at + depth)[:, None] < k, other=0.0)
        if SPANS > 0:
            s_at = scale + at + depth
            inside = at + depth < (at + BLOCK_K if EVEN_K else k)
            if SPANS == 3:
                s = tl.load(s_at[None, :] + image[:, None] * k, mask=inside[None, :], other=0.0)
            else:
                s = tl.load(s_at + lowest * k, mask=inside, other=0.0)[None, :]
                if SPANS == 2:
                    other = tl.load(s_at + highest * k, mask=inside, other=0.0)[None, :]
                    s = tl.where((image == lowest)[:, None], s, other)
            a = (a.to(tl.float32) * s).to(a.dtype)
        if b.dtype != a.dtype:
            b = b.to(tl.float32).to(a.dtype)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if not TMA:
            x_at += BLOCK_K
            w_at += BLOCK_K
    return acc


@triton.jit
def _finish(
    acc, row_scale, column_scale, bias, out, partial, row, valid, tile_m, tile_n, n, chunks,
    GELU: tl.constexpr, RESPONSE: tl.constexpr, ADD: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The epilogue of one tile: acc (BLOCK_M, BLOCK_N) goes to `out`, its sums of squares to `partial`."""
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if row_scale is not None:
        acc *= tl.load(row_scale + row, mask=valid, other=0.0)[:, None]
    if column_scale is not None:
        acc *= tl.load(column_scale + column, mask=column < n, other=0.0)[None, :]
    if bias is not None:
        acc += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    if GELU:
        acc = gelu(acc)
    at = out + row.to(tl.int64)[:, None] * n + column[None, :]
    inside = valid[:, None] & (column < n)[None, :]
    if ADD:
        acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    y = acc.to(out.dtype.element_ty)
    if RESPONSE:  # of what is stored, as a kernel that reads it back would sum it
        square = y.to(tl.float32)
        square = tl.where(valid[:, None], square * square, 0.0)
        square = tl.sum(tl.reshape(square, (BLOCK_M // CHUNK, CHUNK, BLOCK_N)), axis=1)
        chunk = tile_m * (BLOCK_M // CHUNK) + tl.arange(0, BLOCK_M // CHUNK)
        partial_at = partial + chunk.to(tl.int64)[:, None] * n + column[None, :]
        tl.store(partial_at, square, mask=(chunk < chunks)[:, None] & (column < n)[None, :])
    tl.store(at, y, mask=inside)


@triton.jit(do_not_specialize=["m", "rows", "padded", "chunks", "tiles_m", "tiles_n", "programs"])
def product(
    x, w, scale, row_scale, column_scale, bias, out, partial,
    m, n, k, rows, padded, chunks, tiles_m, tiles_n, programs,
    SPANS: tl.constexpr, GELU: tl.constexpr, RESPONSE: tl.constexpr, ADD: tl.constexpr, PADDED: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, SCHEDULE: tl.constexpr, TMA: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """x: (m, k) and w: (n, k), or their descriptors; scale: (m / rows, k) float32; row_scale: (m,),
    column_scale: (n,) float32; bias: (n,); out: (m, n); partial: (chunks, n) float32, `chunks` of all images together.
    What is not asked for is None.
    """
    program = tl.program_id(0)
    if SCHEDULE == TILE:
        tile_m, tile_n = _position(program, tiles_m, tiles_n, GROUP)
        row, valid = _rows(tile_m, m, rows, padded, BLOCK_M, PADDED)
        acc = _accumulate(
            x, w, scale, row, tile_m, tile_n, m, n, k, rows,
            SPANS, TMA, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
        )  # fmt: skip
        _finish(
            acc, row_scale, column_scale, bias, out, partial, row, valid, tile_m, tile_n, n, chunks,
            GELU, RESPONSE, ADD, CHUNK, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        return
    for tile in tl.range(program, tiles_m * tiles_n, programs, flatten=SPANS == 0):
        tile_m, tile_n = _position(tile, tiles_m, tiles_n, GROUP)
        row, valid = _rows(tile_m, m, rows, padded, BLOCK_M, PADDED)
        acc = _accumulate(
            x, w, scale, row, tile_m, tile_n, m, n, k, rows,
            SPANS, TMA, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
        )  # fmt: skip
        _finish(
            acc, row_scale, column_scale, bias, out, partial, row, valid, tile_m, tile_n, n, chunks,
            GELU, RESPONSE, ADD, CHUNK, BLOCK_M, BLOCK_N,
        )  # fmt: skip
