"""Noise that belongs to the image: independent of batch, batch size and device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import CascadeError

SEED_RANGE = 2**64


class NoiseSource:
    """One stream of Gaussian noise per image, on the CPU, seeded (seed + index) mod 2^64.

    `indices` says which images these are: a batch size B for the images 0 … B-1, or a list of them (the
    `batch_index` of a latent cut from a larger batch).  `shape` is that of one image, (C, H, W).
    """

    def __init__(self, seed: int, indices: int | Sequence[int], shape: Sequence[int]):
        numbers = range(indices) if isinstance(indices, int) else indices
        if len(numbers) < 1:
            raise CascadeError("noise for a batch of no images was asked for; at least one is needed.")
        if not shape or min(shape) < 1:
            raise CascadeError(f"noise of shape {tuple(shape)} was asked for; every size must be at least 1.")
        self.shape = tuple(shape)
        self._generators = [_generator(seed, int(index)) for index in numbers]

    def draw(self) -> Tensor:
        """The next noise of every image, (B, C, H, W) float32: first the start's, then each step's."""
        return torch.stack([_normal(self.shape, generator) for generator in self._generators])


def _generator(seed: int, index: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed((seed + index) % SEED_RANGE)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
