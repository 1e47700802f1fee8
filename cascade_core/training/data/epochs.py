"""The order in which training sees its pictures: a pure function of the seed and of the step or epoch."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """A random generator for each purpose and each step or epoch (`number`)."""
    digest = hashlib.blake2b(f"{seed} {purpose} {number}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def batches_per_epoch(count: int, repeat: int, total_batch_size: int) -> int:
    """How many batches of at most `total_batch_size` rows an epoch makes of `count` pictures."""
    return -(-count * repeat // total_batch_size)


def epoch_plan(
    counts: Sequence[int], total_batch_size: int, repeat: int, seed: int, epoch: int
) -> list[tuple[int, Tensor]]:
    """The batches of an epoch in random order: (index of the bucket, indices of its rows).

    counts: pictures in each bucket; total_batch_size: of all ranks together. Each row occurs `repeat` times. A bucket
    is cut into as few batches as will do, of equal size or one apart, so that none is left with a row or two.
    """
    random = generator(seed, "epoch", epoch)
    batches: list[tuple[int, Tensor]] = []
    for bucket, count in enumerate(counts):
        rows = torch.cat([torch.randperm(count, generator=random) for _ in range(repeat)])
        batches += [
            (bucket, part) for part in rows.tensor_split(batches_per_epoch(count, repeat, total_batch_size))
        ]
    return [batches[i] for i in torch.randperm(len(batches), generator=random).tolist()]
