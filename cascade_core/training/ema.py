"""Exponential moving average of weights, with a warm-up so that short runs are not held back by their first steps."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor


def ema_decay(step: int, decay: float) -> float:
    """min(decay, (1 + step) / (10 + step)): averages over about a tenth of the run until `decay` takes over."""
    return min(decay, (1 + step) / (10 + step))


class EMA:
    """The average of a state's tensors. copied: names of those that are copied instead, as are all integers."""

    def __init__(self, state: Mapping[str, Tensor], decay: float, copied: Collection[str] = ()):
        self.decay, self.copied = decay, frozenset(copied)
        self.tensors = {name: value.detach().clone() for name, value in state.items()}

    @torch.no_grad()
    def update(self, state: Mapping[str, Tensor], step: int) -> None:
        """Moves the average towards the state after `step`, counted from 0."""
        averaged = [
            name for name, value in state.items() if value.is_floating_point() and name not in self.copied
        ]
        averages, values = [self.tensors[name] for name in averaged], [state[name] for name in averaged]
        torch._foreach_lerp_(averages, values, 1 - ema_decay(step, self.decay))  # pyright: ignore[reportPrivateImportUsage]
        if copied := sorted(state.keys() - set(averaged)):
            torch._foreach_copy_([self.tensors[name] for name in copied], [state[name] for name in copied])  # pyright: ignore[reportPrivateImportUsage]
