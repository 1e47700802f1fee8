"""Algorithms of a layer's trained change: LoRA, LoHa and LoKr, each with the factors that its files hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt, sqrt
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...adapters.changes import AddedChange, Hadamard, Kronecker, LowRank

Shapes = dict[str, tuple[int, int]]
Values = Sequence[Tensor]  # of a layer's factors, in the order of their shapes


class Dropout(NamedTuple):
    """Dropout rates in training: of hidden values, of ranks or rows, of whole layers' changes."""

    hidden: float = 0.0
    rank: float = 0.0
    layer: float = 0.0


class Algorithm:
    """Computes ΔW (rows, columns) of a layer from `factors`. scaled: the factor that is multiplied by alpha / rank."""

    scaled = "up"

    def shapes(self, rows: int, columns: int, rank: int) -> Shapes:
        """The factors' shapes by name; factors that start at zero come last."""
        raise NotImplementedError

    def is_scaled(self, shapes: Shapes) -> bool:
        return True

    def initial(self, name: str, shape: tuple[int, int], generator: torch.Generator | None) -> Tensor:
        raise NotImplementedError

    def added(self, x: Tensor, values: Values, dropout: Dropout) -> Tensor:
        """ΔW x for x (…, columns); values are in the order of `shapes`."""
        raise NotImplementedError

    def delta(self, values: Values) -> Tensor:
        raise NotImplementedError

    def change(
        self, values: Mapping[str, Tensor], alpha: float | None, magnitude: Tensor | None
    ) -> AddedChange:
        """The change as adapters have it."""
        raise NotImplementedError


class LoRA(Algorithm):
    """up @ down (Hu et al. 2021, arXiv 2106.09685)."""

    def shapes(self, rows: int, columns: int, rank: int) -> Shapes:
        return {"down": (rank, columns), "up": (rows, rank)}

    def initial(self, name: str, shape: tuple[int, int], generator: torch.Generator | None) -> Tensor:
        return torch.zeros(shape) if name == "up" else _as_linear(shape, generator)

    def added(self, x: Tensor, values: Values, dropout: Dropout) -> Tensor:
        down, up = values
        hidden = F.linear(x, down)
        if dropout.hidden:
            hidden = F.dropout(hidden, dropout.hidden)
        if dropout.rank:  # drawn for each picture separately
            hidden = hidden * _mask((len(hidden), *[1] * (hidden.ndim - 2), len(down)), dropout.rank, hidden)
        return F.linear(hidden, up)

    def delta(self, values: Values) -> Tensor:
        down, up = values
        return up @ down

    def change(self, values, alpha, magnitude):
        return LowRank(values["down"], values["up"], alpha, magnitude)


class LoHa(Algorithm):
    """(up @ down) ∘ (up_2 @ down_2) (Hyeon-Woo et al. 2021, arXiv 2108.06098), begun as LyCORIS does."""

    def shapes(self, rows: int, columns: int, rank: int) -> Shapes:
        return {
            "down": (rank, columns), "up": (rows, rank), "down_2": (rank, columns), "up_2": (rows, rank)
        }  # fmt: skip

    def initial(self, name: str, shape: tuple[int, int], generator: torch.Generator | None) -> Tensor:
        if name == "up_2":
            return torch.zeros(shape)
        return torch.empty(shape).normal_(std=0.1 if name == "up" else 1.0, generator=generator)

    def added(self, x: Tensor, values: Values, dropout: Dropout) -> Tensor:
        return _rows_dropped(F.linear(x, self.delta(values)), dropout)

    def delta(self, values: Values) -> Tensor:
        down, up, down_2, up_2 = values
        return (up @ down) * (up_2 @ down_2)

    def change(self, values, alpha, magnitude):
        return Hadamard(**values, alpha=alpha, magnitude=magnitude)


class LoKr(Algorithm):
    """left ⊗ right (Edalati et al. 2022, arXiv 2212.10650); right is low-rank where that is smaller.

    factor: largest number of rows and columns of `left`; None: about the square root of the layer's
    """

    scaled = "left"

    def __init__(self, factor: int | None = None):
        self.factor = factor

    def shapes(self, rows: int, columns: int, rank: int) -> Shapes:
        a, c = (_divisor(size, self.factor) for size in (rows, columns))
        b, d = rows // a, columns // c
        if 2 * rank < max(b, d):
            return {"left": (a, c), "right_down": (rank, d), "right": (b, rank)}
        return {"left": (a, c), "right": (b, d)}

    def is_scaled(self, shapes: Shapes) -> bool:
        return "right_down" in shapes

    def initial(self, name: str, shape: tuple[int, int], generator: torch.Generator | None) -> Tensor:
        return torch.zeros(shape) if name == "right" else _as_linear(shape, generator)

    def added(self, x: Tensor, values: Values, dropout: Dropout) -> Tensor:
        left, *right = values  # (a, c); (b, d), or (rank, d) and (b, rank)
        x = x.unflatten(-1, (left.shape[1], -1))  # (…, c, d)
        for factor in right:
            x = F.linear(x, factor)  # (…, c, b)
        return _rows_dropped((left @ x).flatten(-2), dropout)  # (…, a · b)

    def delta(self, values: Values) -> Tensor:
        left, *right = values
        return torch.kron(left, right[0] if len(right) == 1 else right[1] @ right[0])

    def change(self, values, alpha, magnitude):
        low_rank = "right_down" in values
        return Kronecker(**values, alpha=alpha if low_rank else None, magnitude=magnitude)


def algorithm_of(name: str, factor: int | None) -> Algorithm:
    return {"lora": LoRA, "loha": LoHa}[name]() if name != "lokr" else LoKr(factor)


def _as_linear(shape: tuple[int, int], generator: torch.Generator | None) -> Tensor:
    """torch's default initial values of a linear layer."""
    return torch.empty(shape).uniform_(-1 / sqrt(shape[1]), 1 / sqrt(shape[1]), generator=generator)


def _divisor(size: int, factor: int | None) -> int:
    most = min(isqrt(size), factor or size)
    return next(divisor for divisor in range(most, 0, -1) if size % divisor == 0)


def _mask(shape: Sequence[int], share: float, like: Tensor) -> Tensor:
    return (torch.rand(shape, device=like.device) >= share).to(like.dtype) / (1 - share)


def _rows_dropped(output: Tensor, dropout: Dropout) -> Tensor:
    return output * _mask(output.shape[-1:], dropout.rank, output) if dropout.rank else output
