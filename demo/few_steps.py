"""Consistency distillation for the demo: what the core's `consistency_loss` draws, drawn from a table beforehand.

So a step, including the teacher's whole path, is one CUDA graph.
"""

import torch
from torch import Tensor

from cascade_nodes.cascade_core.diffusion.loss_weights import debiased
from cascade_nodes.cascade_core.diffusion.schedule import alpha_sigma, per_image
from cascade_nodes.cascade_core.training.losses import jump_log_snrs, path_levels
from cascade_nodes.cascade_core.training.settings import ObjectiveSettings


class Jumps:
    """The levels of noise of the teacher's steps in each of the student's, as a table on the accelerator."""

    def __init__(self, objective: ObjectiveSettings, device: torch.device):
        solver_steps, most = objective.solver_steps, objective.max_loss_weight
        self.steps = objective.sampling_steps or solver_steps
        self.pure_noise_share = objective.pure_noise_share
        step = torch.arange(1, self.steps + 1)
        levels = path_levels(jump_log_snrs(step, self.steps, solver_steps, objective.shift))
        self.table = torch.stack([torch.stack(level) for level in levels]).to(device)  # (J + 1, 3, S)
        weight = debiased(levels[0].log_snr)
        self.weight = (weight if most is None else weight.clamp(max=most)).to(device)  # (S,)

    def draw(self, x0: Tensor) -> list[Tensor]:
        """Latents (B, C, h, w) -> noised latents, levels (J + 1, 3, B), weights (B,), whether each ends clean (B,)"""
        step = torch.randint(self.steps, (len(x0),), device=x0.device)
        step[: int(self.pure_noise_share * len(x0))] = self.steps - 1
        levels = self.table[..., step]
        a, b = (per_image(value, x0) for value in alpha_sigma(levels[0, 0]))
        return [a * x0 + b * torch.randn_like(x0), levels, self.weight[step], step == 0]
