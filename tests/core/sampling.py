"""A sampler on a start that is given, for tests of the samplers themselves; runs go through `cascade_core.run`."""

import torch
from torch import Tensor

from cascade_nodes.cascade_core.diffusion.samplers import SAMPLERS, Callback, Denoise, Noise, log_snr_range
from cascade_nodes.cascade_core.diffusion.schedule import noise_cond
from cascade_nodes.cascade_core.run import check_sampler


@torch.no_grad()
def sample_from(
    model: Denoise,
    start: Tensor,
    *,
    steps: int,
    shift: float,
    sampler: str,
    noise: Noise,
    t_start: float = 1.0,
    t_end: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """`start` (B, C, H, W) at time t_start, denoised to t_end.  model(x, noise_cond (B,)) -> epsilon"""
    check_sampler(sampler)
    levels = log_snr_range(steps, shift, t_start, t_end)
    return SAMPLERS[sampler](lambda x, log_snr: model(x, noise_cond(log_snr)), start, levels, noise, callback)
