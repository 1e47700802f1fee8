"""Changes by rotations, OFT and BOFT: of a weight's rows, as LyCORIS does, or of its columns, as PEFT does."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from .changes import Change, Shape, matrix_of


def cayley(q: Tensor) -> Tensor:
    """(I + Q) (I − Q)⁻¹, a rotation for each skew-symmetric Q (..., b, b)."""
    one = torch.eye(q.shape[-1], device=q.device, dtype=q.dtype)
    return torch.linalg.solve(one - q, one + q, left=False)


@dataclass(frozen=True)
class RowRotation(Change):
    """LyCORIS' OFT and BOFT (Qiu et al. 2023, arXiv 2306.07280; Liu et al. 2023, arXiv 2311.06243): W' = rescale · R W.

    blocks: OFT's (n, b, b), n blocks on the diagonal of R, for n · b rows; BOFT's (m, n, b, b), m butterfly factors
    rescale: (c_out, 1), of each row, or None; constraint: the largest norm of all blocks' Q, or 0 for none
    """

    blocks: Tensor
    rescale: Tensor | None = None
    constraint: float = 0.0
    algorithm = "OFT"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.blocks.shape[-3] * self.blocks.shape[-1],)

    def fits(self, shape: Shape) -> bool:
        return len(shape) > 1 and self.shape == (shape[0],)

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        blocks = self.blocks.float()
        q = blocks - blocks.mT
        norm = torch.linalg.vector_norm(q) + 1e-8
        if 0 < self.constraint < norm:
            q = q * (self.constraint / norm)
        rotations = cayley(q)
        count, size = blocks.shape[-3], blocks.shape[-1]
        rows = weight.flatten(1)
        if blocks.ndim == 3:
            rows = torch.bmm(rotations.mT, rows.view(count, size, -1)).flatten(0, 1)
        else:
            for level, rotation in enumerate(rotations):
                half = 2**level * (size // 2)
                rows = rows.unflatten(0, (-1, 2, half)).transpose(1, 2).reshape(count, size, -1)
                rows = torch.bmm(rotation, rows)
                rows = rows.view(-1, half, 2, rows.shape[-1]).transpose(1, 2).flatten(0, 2)
        if self.rescale is not None:
            rows = rows * self.rescale.float().view(-1, 1)
        return torch.lerp(weight, rows.view(weight.shape), strength)


@dataclass(frozen=True)
class ColumnRotation(Change):
    """PEFT's OFT and BOFT: W' = rescale · W Rᵀ.

    blocks: OFT's (n, b · (b − 1) / 2), the upper triangles of n blocks' Q, one for all if n is 1; BOFT's (m, n, b, b)
    rescale: BOFT's, (c_out, 1), or None
    terms: of the Neumann series that replaces OFT's inverse; None: the exact inverse
    epsilon: the largest norm of OFT's Q, of all blocks together, or None
    """

    blocks: Tensor
    rescale: Tensor | None = None
    terms: int | None = None
    epsilon: float | None = None
    algorithm = "PEFT's OFT"

    @property
    def size(self) -> int:
        """The side of a block."""
        if self.blocks.ndim == 4:
            return self.blocks.shape[-1]
        return round((1 + sqrt(1 + 8 * self.blocks.shape[1])) / 2)

    @property
    def shape(self) -> tuple[int, ...]:
        count = self.blocks.shape[-3] if self.blocks.ndim == 4 else len(self.blocks)
        return (1 if self.rescale is None else len(self.rescale), count * self.size)

    def fits(self, shape: Shape) -> bool:
        rows, columns = matrix_of(shape)
        shared = self.blocks.ndim == 2 and len(self.blocks) == 1 and columns > 0 and columns % self.size == 0
        return (self.shape[1] == columns or shared) and (self.rescale is None or len(self.rescale) == rows)

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        columns = weight.flatten(1)
        if self.blocks.ndim == 2:
            rotation = self._rotation().expand(columns.shape[1] // self.size, -1, -1)
            columns = _rotated(columns, rotation)
        else:
            q = self.blocks.float()
            for level, rotation in enumerate(cayley(0.5 * (q.mT - q))):
                # A level's blocks join halves at a distance that grows by level, as in a fast Fourier transform.
                order = torch.arange(columns.shape[1], device=columns.device)
                order = order.view(-1, 2**level, 2, self.size // 2).transpose(1, 2).flatten()
                columns = columns[:, order.argsort()]
                columns = _rotated(columns, rotation)
                columns = columns[:, order]
        if self.rescale is not None:
            columns = columns * self.rescale.float().view(-1, 1)
        return torch.lerp(weight, columns.reshape(weight.shape), strength)

    def _rotation(self) -> Tensor:
        """OFT's blocks of R, (n, b, b)."""
        triangle = self.blocks.float()
        q = triangle.new_zeros(len(triangle), self.size, self.size)
        rows, columns = torch.triu_indices(self.size, self.size, 1, device=q.device)
        q[:, rows, columns] = triangle
        q = q - q.mT
        if self.epsilon is not None:
            largest = self.epsilon / sqrt(len(q))
            norm = torch.linalg.vector_norm(q, dim=(1, 2), keepdim=True)
            q = torch.where(norm <= largest, q, q * (largest / norm))
        if self.terms is None:
            return cayley(-q)
        return _neumann(q, self.terms)


def _neumann(q: Tensor, terms: int) -> Tensor:
    """I + 2Q + 2Q² + … + Qⁿ, PEFT's approximation of (I + Q) (I − Q)⁻¹: n is terms − 1, but 3 for 3 terms."""
    total = torch.eye(q.shape[-1], device=q.device).expand_as(q).clone()
    if terms > 1:
        total.add_(q, alpha=2)
    if terms > 2:
        power = q
        for _ in range(2, max(terms - 1, 3)):
            power = power @ q
            total.add_(power, alpha=2)
        total.add_(power @ q)
    return total


def _rotated(columns: Tensor, rotations: Tensor) -> Tensor:
    """(rows, n · b) @ Rᵀ for n blocks (n, b, b) on the diagonal of R"""
    count, size = rotations.shape[:2]
    out = torch.empty_like(columns, memory_format=torch.contiguous_format)
    blocks, rotated = (x.view(len(x), count, size).transpose(0, 1) for x in (columns, out))  # (n, rows, b)
    torch.bmm(blocks, rotations.mT, out=rotated)
    return out
