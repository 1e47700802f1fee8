"""Changes of one parameter by LoRA and other algorithms.

A change holds the factors of its file, and multiplies them out only when it is applied, one parameter at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import prod
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..checkpoints.files import FLOATING

Shape = Sequence[int]


class Change:
    """Change of one parameter from W to W'. At strength s it is W + s · (W' − W).

    algorithm: its name, for messages
    """

    algorithm: ClassVar[str]

    @property
    def rank(self) -> int | None:
        """The rank of the factors; None where the algorithm has none."""
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape, as far as the file determines it."""
        raise NotImplementedError

    def fits(self, shape: Shape) -> bool:
        """Whether this can change a parameter of that shape."""
        raise NotImplementedError

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        """W + strength · (W' − W); weight: float32, on the device of `tensors`. Returns a new tensor."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """The file's tensors by the names of this class's fields."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # pyright: ignore[reportArgumentType]
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """The same change with other tensors, such as copies on another device."""
        return replace(self, **tensors)  # pyright: ignore[reportArgumentType]


class AddedChange(Change):
    """Change by a ΔW: W' = W + ΔW, or DoRA's.

    magnitude: DoRA's (Liu et al. 2024, arXiv 2402.09353), or None: W' = magnitude · (W + ΔW) / ‖W + ΔW‖, the norm over
    each row (magnitude (c_out, 1)) or over each column ((1, c_in)), whichever the magnitude's shape says.
    """

    magnitude: Tensor | None = None

    def delta(self, shape: Shape | None = None) -> Tensor:
        """ΔW in float32, of the parameter's shape, or else of `shape`."""
        raise NotImplementedError

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        delta = self.delta(weight.shape)
        if self.magnitude is None:
            return torch.add(weight, delta, alpha=strength)
        return torch.lerp(weight, decomposed(weight + delta, self.magnitude), strength)


def decomposed(weight: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA's magnitude · weight / ‖weight‖, normed over each row or each column, by the magnitude's shape."""
    axis = 0 if _by_row(weight, magnitude) else 1  # the dimension that the magnitudes vary along
    normed = [dim for dim in range(weight.ndim) if dim != axis]
    norm = torch.linalg.vector_norm(weight, dim=normed, keepdim=True)
    magnitude = magnitude.to(weight.device, torch.float32).view(norm.shape)
    return weight * (magnitude / norm.clamp_min(torch.finfo(torch.float32).eps))


def _by_row(weight: Tensor, magnitude: Tensor) -> bool:
    return len(magnitude) == magnitude.numel() == len(weight)


def matrix_of(shape: Shape) -> tuple[int, int]:
    """Rows and columns of a weight: (c_out, c_in · k²)."""
    return (shape[0], prod(shape[1:])) if len(shape) > 1 else (0, 0)


def _fits(rows: int, columns: int, shape: Shape) -> bool:
    """Whether a matrix is a weight of that shape, or a depthwise convolution's weight as one row, as in OneTrainer."""
    depthwise = len(shape) == 4 and shape[1] == 1
    return (rows, columns) == matrix_of(shape) or (depthwise and (rows, columns) == (1, prod(shape)))


@dataclass(frozen=True)
class LowRank(AddedChange):
    """Low-rank change of one layer: ΔW = (alpha / rank) · up @ down (Hu et al. 2021, arXiv 2106.09685).

    down: (rank, c_in) or (rank, c_in, k, k); up: (c_out, rank) or (c_out, rank, 1, 1)
    alpha None: the rank, so ΔW = up @ down
    magnitude: DoRA's, or None

    A depthwise convolution, whose weight is (C, 1, k, k), has up (C, rank, 1, 1) and down (rank, 1, k, k), or as
    OneTrainer trains it, up (1, rank, 1, 1) and down (rank, C, k, k).
    """

    down: Tensor
    up: Tensor
    alpha: float | None = None
    magnitude: Tensor | None = None
    algorithm = "LoRA"

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that `up` and `down` make: the weight's, except in OneTrainer's depthwise form."""
        return (len(self.up), *self.down.shape[1:])

    def fits(self, shape: Shape) -> bool:
        return _fits(self.up.shape[0], self.down[0].numel(), shape)

    def delta(self, shape: Shape | None = None) -> Tensor:
        change = self.scale * (self.up.float().flatten(1) @ self.down.float().flatten(1))
        return change.reshape(shape or self.shape)


def low_rank_changes(changes: Mapping[str, Change]) -> dict[str, LowRank]:
    """The changes that are low-rank."""
    return {target: change for target, change in changes.items() if isinstance(change, LowRank)}


def belong_together(down: Tensor, up: Tensor) -> bool:
    """Whether two tensors of a file have the shapes and types of one low-rank change."""
    shaped = {down.ndim, up.ndim} <= {2, 4} and down.numel() > 0 and up.numel() > 0
    return shaped and up[0].numel() == len(down) and down.dtype in FLOATING and up.dtype in FLOATING


@dataclass(frozen=True)
class Hadamard(AddedChange):
    """LoHa (Hyeon-Woo et al. 2021, arXiv 2108.06098): ΔW = (alpha / rank) · (up @ down) ∘ (up_2 @ down_2).

    up, up_2: (c_out, rank); down, down_2: (rank, c_in · k²)
    """

    down: Tensor
    up: Tensor
    down_2: Tensor
    up_2: Tensor
    alpha: float | None = None
    magnitude: Tensor | None = None
    algorithm = "LoHa"

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return (len(self.up), self.down.shape[1])

    def fits(self, shape: Shape) -> bool:
        return _fits(*self.shape, shape)

    def delta(self, shape: Shape | None = None) -> Tensor:
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        change = self.up.float() @ self.down.float()
        change.mul_(self.up_2.float() @ self.down_2.float()).mul_(scale)
        return change.reshape(shape or self.shape)


@dataclass(frozen=True)
class Kronecker(AddedChange):
    """LoKr (Edalati et al. 2022, arXiv 2212.10650): ΔW = (alpha / rank) · left ⊗ right.

    left: (a, c), or (a, rank) with left_down (rank, c); right: (b, d · k²), or (b, rank) with right_down
    (rank, d · k²); for a weight of a · b rows and c · d · k² columns. Where neither is low-rank, the scale is 1.
    """

    left: Tensor
    right: Tensor
    left_down: Tensor | None = None
    right_down: Tensor | None = None
    alpha: float | None = None
    magnitude: Tensor | None = None
    algorithm = "LoKr"

    @property
    def rank(self) -> int | None:
        down = self.left_down if self.right_down is None else self.right_down
        return None if down is None else len(down)

    @property
    def shape(self) -> tuple[int, int]:
        left, right = (self.left_down, self.right_down)
        columns = (self.left if left is None else left).shape[1] * (
            self.right if right is None else right
        ).shape[1]
        return (len(self.left) * len(self.right), columns)

    def fits(self, shape: Shape) -> bool:
        return self.shape == matrix_of(shape)

    def delta(self, shape: Shape | None = None) -> Tensor:
        left, right = _product(self.left, self.left_down), _product(self.right, self.right_down)
        scale = 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank
        return torch.kron(left * scale, right).reshape(shape or self.shape)


def _product(up: Tensor, down: Tensor | None) -> Tensor:
    return up.float() if down is None else up.float() @ down.float()


@dataclass(frozen=True)
class Difference(AddedChange):
    """ΔW itself, of a weight, a bias or a norm."""

    difference: Tensor
    algorithm = "full differences"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.difference.shape)

    def fits(self, shape: Shape) -> bool:
        return _without_ones(self.shape) == _without_ones(shape)

    def delta(self, shape: Shape | None = None) -> Tensor:
        return self.difference.float().reshape(shape or self.shape)


def _without_ones(shape: Shape) -> list[int]:
    """A shape's sizes other than 1: a vector is (C,) in one program and (1, 1, 1, C) in another."""
    return [size for size in shape if size != 1]


@dataclass(frozen=True)
class Replacement(Change):
    """W' itself: PEFT's trained biases and `modules_to_save`."""

    value: Tensor
    algorithm = "whole parameters"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def fits(self, shape: Shape) -> bool:
        return _without_ones(self.shape) == _without_ones(shape)

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        return torch.lerp(weight, self.value.float().view(weight.shape), strength)


@dataclass(frozen=True)
class Scaling(Change):
    """(IA)³ (Liu et al. 2022, arXiv 2205.05638): W' = (offset + factor) · W, of each row or of each column.

    factor: (c_out, 1) or (1, c_in); of a bias (c_out, 1)
    offset: 1 where the file holds the factors' difference from 1 (LyCORIS), 0 where it holds the factors (PEFT)
    """

    factor: Tensor
    offset: int = 0
    algorithm = "(IA)³"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.factor.shape)

    def fits(self, shape: Shape) -> bool:
        rows, columns = self.shape
        return (rows, columns) == (shape[0], 1) or (len(shape) > 1 and (rows, columns) == (1, shape[1]))

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        axis = 0 if len(self.factor) == len(weight) and self.factor.shape[1] == 1 else 1
        along = [size if dim == axis else 1 for dim, size in enumerate(weight.shape)]
        factor = self.factor.float().view(along) + (self.offset - 1)  # of W' − W
        return torch.addcmul(weight, weight, factor, value=strength)
