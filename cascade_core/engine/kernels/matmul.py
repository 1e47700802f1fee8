"""One Triton matrix product, with the operations that follow it in the networks as options.

    out = epilogue(x · wᵀ + bias)        x: (M, K), w: (N, K), out: (M, N); float32 accumulators

Integer weights are converted to x's type as they are loaded; then a tile is computed transposed, since a Hopper card
takes only the first factor from registers. Epilogue: multiplies by the scales of quantised rows of x and w, adds the
former contents of `out`, applies GELU, and sums the squares for the global response norm.

Rows are tokens; every image has `rows` of them. Sums of squares are per chunk of CHUNK rows of one image; a tile
covers one chunk or several. Where CHUNK does not divide `rows`, each image is padded to whole chunks (`padded` rows)
and tiles run over the padded rows, so that a tile may span images but a chunk never does.

A schedule assigns tiles to programs:
`tile`  one program per tile.
`loop`  persistent: as many programs as fit at once, each taking every n-th tile, so that loads overlap a tile's end.
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
    # The polynomial with its sign turned: nothing is negated at the end.
    p = 6.072616488651226e-05 - 1.7937805837825914e-06 * t
    p = p * t - 9.231857754731424e-04
    p = p * t + 8.476847485718695e-03
    p = p * t - 5.3890938804266125e-02
    p = p * t - 4.585415840721885e-01
    p = p * t - 1.1512143698094917
    return tl.maximum(x, 0.0) - t * tl.exp2(t * p - 1.0)


@triton.jit
def _position(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows of tiles at a time, so that concurrent programs share operands in L2."""
    per_group = GROUP * tiles_n
    first = (tile // per_group) * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    return first + (tile % per_group) % size, (tile % per_group) // size


@triton.jit
def _rows(tile_m, m, rows, padded, BLOCK_M: tl.constexpr, PADDED: tl.constexpr):
    """The rows of x in a tile, and which of them exist."""
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    if PADDED:
        image = row // padded
        local = row % padded
        row = image * rows + local
        return row, (local < rows) & (row < m)
    return row, row < m


@triton.jit
def _accumulate(
    x, w, row, tile_m, tile_n, m, n, k,
    TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, CONVERT: tl.constexpr,
):  # fmt: skip
    """x · wᵀ of one tile: (BLOCK_M, BLOCK_N) float32"""
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32) if CONVERT else tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    depth = tl.arange(0, BLOCK_K)
    if not TMA:
        row = tl.minimum(row, m - 1)  # rows beyond the last are computed from it and never stored
        column = tl.minimum(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), n - 1)
        x_at = x + row.to(tl.int64)[:, None] * k + depth[None, :]
        w_at = w + column.to(tl.int64)[:, None] * k + depth[None, :]
    for step in range(tl.maximum(tl.cdiv(k, BLOCK_K), 1)):
        # The maximum tells the compiler that the loop runs.
        at = step * BLOCK_K
        if TMA:
            a = x.load([tile_m * BLOCK_M, at])
            b = w.load([tile_n * BLOCK_N, at])
        elif EVEN_K:
            a = tl.load(x_at)
            b = tl.load(w_at)
        else:
            a = tl.load(x_at, mask=(at + depth)[None, :] < k, other=0.0)
            b = tl.load(w_at, mask=(at + depth)[None, :] < k, other=0.0)
        if CONVERT:
            acc = tl.dot(b.to(tl.float32).to(a.dtype), a.T, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        if not TMA:
            x_at += BLOCK_K
            w_at += BLOCK_K
    return acc.T if CONVERT else acc


@triton.jit
def _finish(
    acc, row_scale, column_scale, bias, out, partial, row, valid, tile_m, tile_n, n, chunks,
    GELU: tl.constexpr, RESPONSE: tl.constexpr, ADD: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The epilogue of one tile: stores acc (BLOCK_M, BLOCK_N) in `out`, its sums of squares in `partial`."""
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
    if RESPONSE:  # squares of the rounded values, as if a kernel read them back
        square = y.to(tl.float32)
        square = tl.where(valid[:, None], square * square, 0.0)
        square = tl.sum(tl.reshape(square, (BLOCK_M // CHUNK, CHUNK, BLOCK_N)), axis=1)
        chunk = tile_m * (BLOCK_M // CHUNK) + tl.arange(0, BLOCK_M // CHUNK)
        partial_at = partial + chunk.to(tl.int64)[:, None] * n + column[None, :]
        tl.store(partial_at, square, mask=(chunk < chunks)[:, None] & (column < n)[None, :])
    tl.store(at, y, mask=inside)


@triton.jit
def _tile(
    tile, x, w, row_scale, column_scale, bias, out, partial,
    m, n, k, rows, padded, chunks, tiles_m, tiles_n,
    GELU: tl.constexpr, RESPONSE: tl.constexpr, ADD: tl.constexpr, PADDED: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, CONVERT: tl.constexpr, TMA: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of the result, the `tile`-th."""
    tile_m, tile_n = _position(tile, tiles_m, tiles_n, GROUP)
    row, valid = _rows(tile_m, m, rows, padded, BLOCK_M, PADDED)
    acc = _accumulate(
        x, w, row, tile_m, tile_n, m, n, k, TMA, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION, CONVERT
    )
    _finish(
        acc, row_scale, column_scale, bias, out, partial, row, valid, tile_m, tile_n, n, chunks,
        GELU, RESPONSE, ADD, CHUNK, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["m", "rows", "padded", "chunks", "tiles_m", "tiles_n", "programs"])
def product(
    x, w, row_scale, column_scale, bias, out, partial,
    m, n, k, rows, padded, chunks, tiles_m, tiles_n, programs,
    GELU: tl.constexpr, RESPONSE: tl.constexpr, ADD: tl.constexpr, PADDED: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, CONVERT: tl.constexpr, SCHEDULE: tl.constexpr, TMA: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """x: (m, k) and w: (n, k), or their TMA descriptors; row_scale: (m,), column_scale: (n,) float32; bias: (n,);
    out: (m, n); partial: (chunks, n) float32, `chunks` of all images together. Unused tensors are None.
    """
    program = tl.program_id(0)
    if SCHEDULE == TILE:
        _tile(
            program, x, w, row_scale, column_scale, bias, out, partial,
            m, n, k, rows, padded, chunks, tiles_m, tiles_n,
            GELU, RESPONSE, ADD, PADDED, EVEN_K, PRECISION, CONVERT, TMA, CHUNK, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
        )  # fmt: skip
    else:
        for tile in tl.range(program, tiles_m * tiles_n, programs, flatten=True):
            _tile(
                tile, x, w, row_scale, column_scale, bias, out, partial,
                m, n, k, rows, padded, chunks, tiles_m, tiles_n,
                GELU, RESPONSE, ADD, PADDED, EVEN_K, PRECISION, CONVERT, TMA, CHUNK, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
            )  # fmt: skip
