"""The order in which training sees its pictures: a pure function of the seed and of the step or epoch."""

import bisect
import hashlib
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_ROWS = 2**24  # of an epoch, 8 bytes each


def generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """A random generator for each purpose and each step or epoch (`number`)."""
    digest = hashlib.blake2b(f"{seed} {purpose} {number}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def batches_per_epoch(count: int, repeat: int, total_batch_size: int) -> int:
    """How many batches of at most `total_batch_size` rows an epoch makes of `count` pictures."""
    return -(-count * repeat // total_batch_size)


def epoch_repeats(count: int, repeat: int) -> int:
    """How often an epoch shows each of `count` pictures; repeats beyond MAX_ROWS follow in later epochs."""
    return max(min(repeat, MAX_ROWS // count), 1)


class EpochPlan:
    """The batches of an epoch in random order; plan[position] is (index of the bucket, indices of its rows).

    counts: pictures in each bucket; total_batch_size: of all ranks together. Each row occurs `repeat` times. A bucket
    is cut into as few batches as possible, whose sizes differ by at most one, so that no batch is left with a row or
    two.
    """

    def __init__(self, counts: Sequence[int], total_batch_size: int, repeat: int, seed: int, epoch: int):
        random = generator(seed, "epoch", epoch)
        self.rows = []
        for count in counts:
            rows = torch.empty(repeat, count, dtype=torch.int64)
            for each in rows:
                torch.randperm(count, generator=random, out=each)
            self.rows.append(rows.flatten())
        batches = [batches_per_epoch(count, repeat, total_batch_size) for count in counts]
        self.starts = [0, *itertools.accumulate(batches)]  # each bucket's first batch, then their total
        self.order = torch.randperm(self.starts[-1], generator=random)

    def __getitem__(self, position: int) -> tuple[int, Tensor]:
        batch = int(self.order[position])
        bucket = bisect.bisect_right(self.starts, batch) - 1
        first, end = self.starts[bucket : bucket + 2]
        batch -= first
        # As in tensor_split, the first batches are one row larger.
        size, larger = divmod(len(self.rows[bucket]), end - first)
        start = batch * size + min(batch, larger)
        return bucket, self.rows[bucket][start : start + size + (batch < larger)]
