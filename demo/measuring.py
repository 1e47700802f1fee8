"""Rates, PSNR and batches for the measurements of the demo's tasks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cascade_nodes.demo.captions import Spec
from cascade_nodes.demo.judge import read, score, summary

BATCH = 50
Figures = dict[str, float]


def rates(images: Tensor, specs: Sequence[Spec]) -> Figures:
    """Rates at which pictures agree with their specs."""
    return summary(score(reading, spec) for reading, spec in zip(read(images), specs, strict=True))


def psnr(images: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
    """PSNR in dB (N,) of pictures (N, 3, H, W) in [0, 1], over the pixels of a mask (N, 1, H, W) where given."""
    error = (images - reference).square()
    if mask is None:
        mean = error.mean(dim=(1, 2, 3))
    else:
        mean = (error * mask).sum((1, 2, 3)) / (error.shape[1] * mask.sum((1, 2, 3))).clamp_min(1)
    return -10 * mean.clamp_min(1e-10).log10()


def in_batches(function: Callable[[slice], Tensor], count: int, batch: int = BATCH) -> Tensor:
    """Runs function(slice of the rows) over all rows and joins the results on the CPU."""
    return torch.cat([function(slice(i, min(i + batch, count))).cpu() for i in range(0, count, batch)])
