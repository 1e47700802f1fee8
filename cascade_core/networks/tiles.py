"""Large pictures a tile at a time, so that memory depends on the tile and not on the picture.

Stage A and the previewer have a small receptive field: tiles with a halo of that many positions, which is cut off
afterwards, give the same result as the whole picture, up to rounding. Stage B sees the whole picture (global response
norm, attention): as in MultiDiffusion (arXiv 2302.08113), its tiles overlap, and their predictions are blended at
every step.

Tiles, halos and overlaps are in positions of the latent.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .config import StageAConfig
from .layers import resize

OVERLAP = 1 / 2  # of a Stage B tile's side
ALIGNMENT = 16  # Stage B's tiles begin at multiples of this, as the positions of its innermost level do
PREVIEWER_HALO = 2
PREVIEWER_SIDE = 8  # pixels of a position

Area = tuple[slice, slice]  # rows, columns


def decode_halo(config: StageAConfig) -> int:
    """Receptive field of Stage A's decoder, in positions of the latent on each side."""
    reach = 1  # of the 3 × 3 convolution in the residual block at the finest level
    for _ in range(config.levels - 1):
        reach = reach // 2 + 1  # the transposed convolution, in positions of the level below
        reach += 1
    return reach - 1 + config.bottleneck_blocks


def encode_halo(config: StageAConfig) -> int:
    """Receptive field of Stage A's encoder, in whole positions of the latent on each side."""
    reach = 1  # of the 3 × 3 convolution in the residual block at the coarsest level
    for _ in range(config.levels - 1):
        reach = 2 * reach + 1 + 1  # the strided convolution, and the next residual block
    return -(-reach // 2 ** (config.levels - 1))


def join_tiles(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    tile_positions: int,
    halo: int,
    down: int = 1,
    up: int = 1,
) -> Tensor:
    """function(x), computed on tiles of `tile_positions` a side that see `halo` more on each side.

    down, up: values a side of one position, in x and in the result.
    x: (B, C, h · down, w · down) -> (B, C', h · up, w · up)
    """
    height, width = (side // down for side in x.shape[-2:])
    if tile_positions < 1 or max(height, width) <= tile_positions:
        return function(x)
    joined = None
    for rows in _spans(height, tile_positions):
        for columns in _spans(width, tile_positions):
            seen = _widened(rows, halo, height), _widened(columns, halo, width)
            piece = function(x[(..., *_times(seen, down))])
            if joined is None:
                joined = piece.new_empty(*piece.shape[:2], height * up, width * up)
            inner = _within(rows, seen[0]), _within(columns, seen[1])
            joined[(..., *_times((rows, columns), up))] = piece[(..., *_times(inner, up))]
    assert joined is not None
    return joined


def seen_sides(length: int, tile_positions: int, halo: int) -> set[int]:
    """How long the tiles of `join_tiles` are that cover `length`, with what they see."""
    if tile_positions < 1 or length <= tile_positions:
        return {length}
    seen = (_widened(span, halo, length) for span in _spans(length, tile_positions))
    return {span.stop - span.start for span in seen}


def fitting_tile(height: int, width: int, halo: int, fits: Callable[[int], bool]) -> int:
    """Side of the largest equal tiles whose positions, halo included, satisfy `fits`; 0 where the whole picture does.

    At least 1, even where nothing fits.
    """
    longer = max(height, width)
    for parts in range(1, longer + 1):
        tile_positions = math.ceil(longer / parts)
        seen = longer if parts == 1 else tile_positions + 2 * halo
        if fits(min(height, seen) * min(width, seen)):
            return 0 if parts == 1 else tile_positions
    return 1


def _spans(length: int, tile_positions: int) -> Iterator[slice]:
    return (slice(start, min(start + tile_positions, length)) for start in range(0, length, tile_positions))


def _widened(span: slice, halo: int, length: int) -> slice:
    return slice(max(span.start - halo, 0), min(span.stop + halo, length))


def _within(span: slice, seen: slice) -> slice:
    return slice(span.start - seen.start, span.stop - seen.start)


def _times(area: Area, factor: int) -> Area:
    rows, columns = (slice(span.start * factor, span.stop * factor) for span in area)
    return rows, columns


def predict_in_tiles(
    predict: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    effnet: Tensor,
    tile_positions: int,
    patch_size: int,
) -> Tensor:
    """predict(x, effnet) of Stage B, blended from overlapping tiles of `tile_positions` a side.

    Each tile gets its part of the conditioning, which is first resized for the whole picture and then cut.

    x: (B, 4, h, w), effnet: (B, 16, h', w') of any size -> like x
    """
    height, width = x.shape[-2:]
    if max(height, width) <= tile_positions:
        return predict(x, effnet)
    effnet = resize(effnet, (-(-height // patch_size), -(-width // patch_size)))
    blended = weights = None
    for rows in overlapping(height, tile_positions):
        for columns in overlapping(width, tile_positions):
            area = rows, columns
            seen = tuple(slice(span.start // patch_size, -(-span.stop // patch_size)) for span in area)
            part = predict(x[(..., *area)], effnet[(..., *seen)])
            weight = _ramp(rows, height, part)[:, None] * _ramp(columns, width, part)
            if blended is None or weights is None:
                blended, weights = part.new_zeros(x.shape), weight.new_zeros(height, width)
            blended[(..., *area)] += part * weight
            weights[area] += weight
    assert blended is not None
    assert weights is not None
    return blended / weights


def in_whole_patches(predict: Callable[[Tensor], Tensor], x: Tensor, patch_size: int) -> Tensor:
    """predict(x) for a latent whose sides may end within a patch: x is padded to whole patches by mirroring, and the
    result is cropped.

    x: (B, C, h, w) -> like x
    """
    height, width = x.shape[-2:]
    if height % patch_size == 0 and width % patch_size == 0:
        return predict(x)
    rows, columns = (_mirrored(side, patch_size, x.device) for side in (height, width))
    return predict(x[..., rows, :][..., columns])[..., :height, :width]


def _mirrored(side: int, patch_size: int, device: torch.device) -> Tensor:
    """Positions 0, 1, …, side - 1, then back from the last one until the patches are whole."""
    position = torch.arange(-(-side // patch_size) * patch_size, device=device)
    return (side - 1 - (side - 1 - position).abs()).clamp(min=0)


def overlapping(length: int, tile_positions: int) -> list[slice]:
    """Spans of `tile_positions` that cover `length` and overlap by `OVERLAP` of a tile or more, evenly placed.

    They begin at multiples of ALIGNMENT; the last span is shorter where `length` is not such a multiple.
    """
    if length <= tile_positions:
        return [slice(0, length)]
    steps = math.ceil((length - tile_positions) / (tile_positions * (1 - OVERLAP)))
    starts = (
        math.ceil(i * (length - tile_positions) / steps / ALIGNMENT) * ALIGNMENT for i in range(steps + 1)
    )
    return [slice(start, min(start + tile_positions, length)) for start in starts]


def _ramp(span: slice, length: int, like: Tensor) -> Tensor:
    """Blending weight of each position: falls towards the tile's ends, but not where the picture ends.  (span,)"""
    position = torch.arange(span.start, span.stop, device=like.device, dtype=torch.float32) + 0.5
    fade = (span.stop - span.start) * OVERLAP
    rise = (position - span.start) / fade if span.start else torch.ones_like(position)
    fall = (span.stop - position) / fade if span.stop < length else torch.ones_like(position)
    return torch.minimum(rise, fall).clamp(max=1)
