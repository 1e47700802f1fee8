"""In which order training sees its pictures: everything follows from the seed and the step's or the epoch's number."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """Random numbers of their own for each purpose and each step or epoch."""
    digest = hashlib.blake2b(f"{seed} {purpose} {number}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def batches_of(count: int, repeat: int, together: int) -> int:
    """How many batches of at most `together` rows an epoch makes of `count` pictures."""
    return -(-count * repeat // together)


def epoch_plan(
    counts: Sequence[int], together: int, repeat: int, seed: int, epoch: int
) -> list[tuple[int, Tensor]]:
    """The batches of an epoch: (number of the bucket, rows of it), in random order.

    Each row occurs `repeat` times. A bucket is cut into as few batches of at most `together` rows as will do, of equal
    size or one apart, so that none is left with a row or two.
    """
    random = generator(seed, "epoch", epoch)
    batches: list[tuple[int, Tensor]] = []
    for number, count in enumerate(counts):
        rows = torch.cat([torch.randperm(count, generator=random) for _ in range(repeat)])
        batches += [(number, part) for part in rows.tensor_split(batches_of(count, repeat, together))]
    return [batches[i] for i in torch.randperm(len(batches), generator=random).tolist()]
