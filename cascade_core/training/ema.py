"""Exponential moving average of weights, with a warm-up so that short runs are not held back by their first steps."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


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


class Average:
    """The average of a state's tensors; what is not floating point is copied."""

    def __init__(self, state: Mapping[str, Tensor], decay: float):
        self.decay = decay
        self.tensors = {name: value.detach().clone() for name, value in state.items()}

    @torch.no_grad()
    def update(self, state: Mapping[str, Tensor], step: int) -> None:
        moving = [name for name, value in state.items() if value.is_floating_point()]
        mine, theirs = [self.tensors[name] for name in moving], [state[name] for name in moving]
        torch._foreach_lerp_(mine, theirs, 1 - ema_decay(step, self.decay))  # pyright: ignore[reportPrivateImportUsage]
        if still := sorted(state.keys() - set(moving)):
            torch._foreach_copy_([self.tensors[name] for name in still], [state[name] for name in still])  # pyright: ignore[reportPrivateImportUsage]
