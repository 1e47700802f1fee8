"""Exponential moving average of weights, with a warm-up so that short runs are not held back by their first steps."""

import torch
from torch import nn


def ema_decay(step: int, decay: float) -> float:
    """min(decay, (1 + step) / (10 + step)): averages over about a tenth of the run until `decay` takes over."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Moves `average` towards `model`; buffers (BatchNorm's statistics) are copied."""
    mine: list[torch.Tensor] = list(average.parameters())
    theirs: list[torch.Tensor] = list(model.parameters())
    torch._foreach_lerp_(mine, theirs, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
    for buffer, new in zip(average.buffers(), model.buffers(), strict=True):
        buffer.copy_(new)
