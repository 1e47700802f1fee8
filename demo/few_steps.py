"""Consistency distillation for the demo: the core's `consistency_loss`, with all random numbers drawn beforehand.

So a step, including the teacher's whole path, is one CUDA graph.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from cascade_nodes.cascade_core.diffusion.loss_weights import debiased
from cascade_nodes.cascade_core.diffusion.schedule import alpha_sigma, log_snr, log_snr_limits, noise_cond
from cascade_nodes.cascade_core.training.settings import ObjectiveSettings

Predict = Callable[[Tensor, Tensor], Tensor]  # noised latents (B, C, h, w), noise conditions (B,) -> epsilon


class Levels(NamedTuple):
    """Noise levels of latents, each (B, 1, 1, 1): x = a·x0 + b·epsilon. ratio: `dpmpp_2m`'s, of two steps."""

    a: Tensor
    b: Tensor
    condition: Tensor
    ratio: Tensor


class Jumps:
    """The teacher's levels in each of the student's steps, as a table on the accelerator.

    Row s - 1 holds those of the student's step s, from where it begins to where it ends.
    """

    def __init__(self, objective: ObjectiveSettings, device: torch.device):
        solver_steps = objective.solver_steps
        self.steps = objective.sampling_steps or solver_steps
        self.pure_noise_share = objective.pure_noise_share
        jump = solver_steps // self.steps
        # As in `consistency_loss`, to the bit
        step = torch.arange(1, self.steps + 1)
        times = [(step - i / jump) / self.steps for i in range(jump)] + [(step - 1) / self.steps]
        snr = torch.stack([log_snr(time, objective.shift) for time in times])  # (J + 1, S)
        a, b = alpha_sigma(snr)
        ratio = torch.zeros_like(snr)
        ratio[1:-1] = (snr[2:] - snr[1:-1]) / (2 * (snr[1:-1] - snr[:-2]))
        ratio[:-1][snr[1:] >= log_snr_limits()[1]] = (
            0  # a step that ends in the clean picture is of first order
        )
        self.table = torch.stack([a, b, noise_cond(snr), ratio]).to(device)  # (4, J + 1, S)
        most = objective.max_loss_weight
        weight = debiased(snr[0])
        self.weight = (weight if most is None else weight.clamp(max=most)).to(device)

    def draw(self, x0: Tensor) -> list[Tensor]:
        """Latents (B, C, h, w) -> noised latents, levels (4, J + 1, B), weights (B,), whether each ends clean (B,)"""
        step = torch.randint(self.steps, (len(x0),), device=x0.device)
        step[: int(self.pure_noise_share * len(x0))] = self.steps - 1
        levels = self.table[..., step]
        a, b = (value.view(-1, 1, 1, 1) for value in levels[:2, 0])
        return [a * x0 + b * torch.randn_like(x0), levels, self.weight[step], (step == 0).float()]


def consistency_terms(
    predict: Predict, teacher: Predict, x: Tensor, levels: Tensor, weight: Tensor, clean: Tensor
) -> dict[str, Tensor]:
    """The loss for the result of `Jumps.draw`. teacher: the guided prediction."""
    path = [Levels(*(value.view(-1, 1, 1, 1) for value in levels[:, i])) for i in range(levels.shape[1])]
    here, there = path[0], path[-1]
    with torch.no_grad():
        x_next, end = _along(teacher, x, path)
        predicted = (x_next - predict(x_next, there.condition.flatten()).float() * there.b) / there.a
        end = torch.where(clean.view(-1, 1, 1, 1) > 0, end, predicted)
        target = (x - here.a * end) / here.b
    error = (predict(x, here.condition.flatten()).float() - target).square().mean(dim=(1, 2, 3))  # (B,)
    return {"loss": (error * weight).mean(), "epsilon": error.mean()}


def _along(teacher: Predict, x: Tensor, path: list[Levels]) -> tuple[Tensor, Tensor]:
    """Follows the teacher's path as the core's `along_path` does: its end, and the x0 predicted in its last step."""
    x0 = before = x  # replaced in the first step
    for here, there in pairwise(path):
        before, x0 = x0, (x - teacher(x, here.condition.flatten()).float() * here.b) / here.a
        data = x0 if here is path[0] else x0 + here.ratio * (x0 - before)
        x = there.b / here.b * x + (there.a - here.a * there.b / here.b) * data
    return x, x0
