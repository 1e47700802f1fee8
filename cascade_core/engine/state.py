"""Data that the bound blocks read and change: the cache of a run, and the state of one forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .operations import Operations


@dataclass
class RunCache:
    """Values that are constant across sampling steps, at fixed addresses, which CUDA graphs need.

    table       (Σ 2C,) float32: scale and shift of every TimestepBlock at the current noise condition
    keys        (B, T, C) of the conditioning for each attention block, as `values`; None until computed
    peaks       (1,) float32, where weights are packed: a bound of the magnitudes of an attention block's values
    conditions  (B, N, C), added to the embedded x, or None (Stage C has none)
    control     a residual (B, C, h, w) or None for each ResBlock

    Inputs of the entries that still have to be computed, by each block when its weights are available:
    noise_embedding  (1, R · (1 + conds)), or None where `table` is complete
    cond_tokens      SiLU of the conditioning tokens (B, T, C_cond), or None where `keys` and `values` are complete
    """

    table: Tensor
    keys: list[Any]
    values: list[Any]
    conditions: Tensor | None = None
    control: Sequence[Tensor | None] = ()
    noise_embedding: Tensor | None = None
    cond_tokens: Tensor | None = None
    peaks: list[Any] = field(default_factory=list)


@dataclass
class ForwardState:
    """The state of one forward between two blocks.

    x, size    feature map (B, H · W, C), and (H, W)
    skips      feature maps of the levels above, with their sizes
    resblocks  number of ResBlocks that have run: the index of the next one's ControlNet residual
    """

    ops: Operations
    cache: RunCache
    x: Tensor
    size: tuple[int, int]
    skips: list[tuple[Tensor, tuple[int, int]]] = field(default_factory=list)
    resblocks: int = 0
