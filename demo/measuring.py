"""What the measurements of the demo's tasks share."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cascade_nodes.demo.captions import Spec
from cascade_nodes.demo.judge import read, score, summary

BATCH = 50
Figures = dict[str, float]


def rates(images: Tensor, specs: Sequence[Spec]) -> Figures:
    """How much of what each spec states is so in its picture."""
    return summary(score(reading, spec) for reading, spec in zip(read(images), specs, strict=True))


def psnr(one: Tensor, other: Tensor, where: Tensor | None = None) -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1] -> (N,) dB; of the pixels of `where` alone, a mask (N, 1, H, W)."""
    error = (one - other).square()
    if where is None:
        mean = error.mean(dim=(1, 2, 3))
    else:
        mean = (error * where).sum((1, 2, 3)) / (error.shape[1] * where.sum((1, 2, 3))).clamp_min(1)
    return -10 * mean.clamp_min(1e-10).log10()


def in_batches(function: Callable[[slice], Tensor], count: int, batch: int = BATCH) -> Tensor:
    """function(slice of the rows) over all rows, joined on the CPU."""
    return torch.cat([function(slice(i, min(i + batch, count))).cpu() for i in range(0, count, batch)])
