"""Splits low-rank changes of the published fused attention input into those of our three layers, and fuses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import CascadeError
from .changes import Change, Difference, LowRank, Replacement
from .names import FUSED, QKV


def split(change: Change, target: str) -> dict[str, Change]:
    """Splits a change of the fused input (3C rows) into those of `attn.to_q`, `attn.to_k`, `attn.to_v`: a third each.

    target: its layer, or its bias. Raises CascadeError for a change that cannot be split.
    """
    block, _, parameter = target.partition(FUSED)
    thirds = _thirds(change)
    if len(thirds) != 3:
        reason = f"{change.shape[0]} rows" if change.shape[0] % 3 else "one magnitude for q, k and v together"
        if not isinstance(change, LowRank | Difference | Replacement):
            reason = f"a change by {change.algorithm} for q, k and v together"
        raise CascadeError(
            f"{target} has {reason}, which cannot be split into the three layers that Stage C has; train it with "
            "separate layers, or with a magnitude for each row."
        )
    return {f"{block}{part}{parameter}": third for part, third in zip(QKV, thirds, strict=True)}


def _thirds(change: Change) -> Sequence[Change]:
    if change.shape[0] % 3:
        return ()
    match change:
        case LowRank():
            if change.magnitude is not None and len(change.magnitude) == 1:
                return ()
            magnitudes = (None,) * 3 if change.magnitude is None else change.magnitude.chunk(3)
            return [
                LowRank(change.down, up, change.alpha, magnitude)
                for up, magnitude in zip(change.up.chunk(3), magnitudes, strict=True)
            ]
        case Difference():
            return [Difference(third) for third in change.difference.chunk(3)]
        case Replacement():
            return [Replacement(third) for third in change.value.chunk(3)]
    return ()


def fuse(parts: Mapping[str, LowRank], rows: int) -> LowRank:
    """Fuses the changes of `attn.to_q/to_k/to_v`, of which some may be missing, into one of 3·`rows` rows.

    The result is exact: of the same rank if all share one `down`, else with all `down`s stacked.
    """
    changes = [parts.get(name) for name in QKV]
    present = [change for change in changes if change is not None]
    first = present[0]
    if all(_share(first, change) for change in present):
        zeros = torch.zeros_like(first.up)
        return LowRank(
            first.down, torch.cat([change.up if change else zeros for change in changes]), first.alpha
        )
    blocks = [
        exact_product(change.up, change.scale) if change else first.up.new_zeros(rows, 0)
        for change in changes
    ]
    return LowRank(torch.cat([change.down for change in present]), torch.block_diag(*blocks))


def _share(first: LowRank, second: LowRank) -> bool:
    same = first.down is second.down or torch.equal(first.down, second.down)
    return same and first.scale == second.scale


def exact_product(tensor: Tensor, factor: float) -> Tensor:
    """tensor · factor, in the tensor's dtype if that is exact, else in float32."""
    if factor == 1:
        return tensor
    product = tensor.float() * factor
    narrow = product.to(tensor.dtype)
    return narrow if torch.equal(narrow.float(), product) else product
