"""Rates, PSNR and batches for the measurements of the demo's tasks."""

from collections.abc import Callable, Sequence
from random import Random

import torch
from torch import Tensor

from cascade_nodes.demo.captions import Spec, full_spec, verbalise
from cascade_nodes.demo.judge import read, score, summary
from cascade_nodes.demo.scenes import Scene

SEED = 20_000
Figures = dict[str, float]


def prompts_of(scenes: Sequence[Scene]) -> tuple[list[str], list[Spec]]:
    """Prompts that state everything, in random words, and their specs."""
    rng = Random(SEED)
    specs = [full_spec(scene) for scene in scenes]
    return [verbalise(spec, rng) for spec in specs], specs


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


def in_batches(function: Callable[[slice], Tensor], count: int, batch: int | None = None) -> Tensor:
    """Runs function(slice of the rows) over all rows and joins the results on the CPU.

    batch: rows at once; None: enough to keep the device busy
    """
    batch = batch or (100 if torch.cuda.is_available() else 50)
    return torch.cat([function(slice(i, min(i + batch, count))).cpu() for i in range(0, count, batch)])
