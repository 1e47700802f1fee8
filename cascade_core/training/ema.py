"""Exponential moving average of weights, with a warm-up so that short runs are not held back by their first steps."""

import torch
from torch import nn


def ema_decay(step: int, decay: float) -> float:
    """min(decay, (1 + step) / (10 + step)): averages over about a tenth of the run until `decay` takes over."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Moves `average` towards `model`; buffers (BatchNorm's statistics) are copied."""
    weights = list(average.parameters()), list(model.parameters())
    torch._foreach_lerp_(*weights, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
    for mine, theirs in zip(average.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)
