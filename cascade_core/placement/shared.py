"""Workspaces of CUDA graphs that the networks of a device share: only one of them runs at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor


class RunBytes(NamedTuple):
    """Bytes that runs of a shape are known to take, once one of them has ended.

    workspace: of its CUDA graph, which may be shared; caches: of keys and values, which the network has for itself
    """

    workspace: int
    caches: int


def largest_run(runs: Sequence[RunBytes | None]) -> RunBytes | None:
    """What is enough for each of these runs; None where one is not known, or there is none."""
    known = [each for each in runs if each is not None]
    if not known or len(known) < len(runs):
        return None
    return RunBytes(*map(max, zip(*known, strict=True)))


class SharedWorkspaces:
    """Pieces of memory, each for as long as any network's graphs keep it."""

    def __init__(self) -> None:
        self._pieces: list[ref[Tensor]] = []

    def take(self, size: int, device: torch.device) -> Tensor:
        """The largest piece if it has `size` bytes, or a new one.

        Not the smallest that fits: two networks that lose their graphs in turn would keep that one for each other.
        """
        pieces = [piece for piece in self.pieces() if piece.nbytes >= size and piece.device == device]
        if pieces:
            return max(pieces, key=lambda piece: piece.nbytes)
        piece = self._empty(size, device)
        self._pieces.append(ref(piece))
        return piece

    @staticmethod
    def _empty(size: int, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=device)

    def pieces(self) -> list[Tensor]:
        """All that are in use."""
        self._pieces = [each for each in self._pieces if each() is not None]
        return [piece for each in self._pieces if (piece := each()) is not None]

    def largest(self) -> Tensor | None:
        return max(self.pieces(), key=lambda piece: piece.nbytes, default=None)
