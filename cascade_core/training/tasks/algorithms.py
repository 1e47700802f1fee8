"""Algorithms of a layer's trained change: LoRA, LoHa and LoKr, each with the factors that its files hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isqrt, sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from ...adapters.changes import AddedChange, Hadamard, Kronecker, LowRank

Shapes = dict[str, tuple[int, int]]
Values = Sequence[Tensor]  # of a layer's factors, in the order of their shapes


class Dropout:
    """Dropout rates in training: of hidden values, of ranks or rows, of whole layers' changes.

    Masks are kept rather than drawn again where a backward pass recomputes a block: no CUDA graph could set the random
    generator back.
    """

    def __init__(self, hidden: float = 0.0, rank: float = 0.0, layer: float = 0.0):
        self.hidden, self.rank, self.layer = hidden, rank, layer
        self._kept: list[Tensor] | None = None
        self._taken: Iterator[Tensor] | None = None

    def hidden_mask(self, like: Tensor) -> Tensor:
        """What hidden values are multiplied with."""
        return self._mask(lambda: F.dropout(torch.ones_like(like), self.hidden))

    def rank_mask(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """What ranks or rows are multiplied with."""

        def draw() -> Tensor:
            return (torch.rand(shape, device=like.device) >= self.rank).to(like.dtype) / (1 - self.rank)

        return self._mask(draw)

    def kept_layers(self, count: int) -> Tensor | None:
        """(count,) bool, on the CPU: the layers whose change is kept; None for all."""
        return torch.rand(count) >= self.layer if self.layer else None

    def _mask(self, draw: Callable[[], Tensor]) -> Tensor:
        if self._taken is not None:
            return next(self._taken)
        mask = draw()
        if self._kept is not None:
            self._kept.append(mask)
        return mask

    @contextmanager
    def keeping(self, masks: list[Tensor]) -> Iterator[None]:
        """Adds the masks that are drawn inside the block to a list."""
        self._kept = masks
        try:
            yield
        finally:
            self._kept = None

    @contextmanager
    def taking(self, masks: list[Tensor]) -> Iterator[None]:
        """Takes masks of a list inside the block, in its order."""
        self._taken = iter(masks)
        try:
            yield
        finally:
            self._taken = None


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
        """The change in the form that adapters use."""
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
            hidden = hidden * dropout.hidden_mask(hidden)
        if dropout.rank:  # drawn for each picture separately
            hidden = hidden * dropout.rank_mask((len(hidden), *[1] * (hidden.ndim - 2), len(down)), hidden)
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


def _rows_dropped(output: Tensor, dropout: Dropout) -> Tensor:
    return output * dropout.rank_mask(output.shape[-1:], output) if dropout.rank else output
