"""The forward process for training: drawn times, and latents noised to them with their targets and weights."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .loss_weights import p2
from .schedule import alpha_sigma, at_least_float32, log_snr, noise_cond, per_image


class Diffused(NamedTuple):
    """Result of `diffuse`.  Latents are (B, C, H, W), the rest (B,)."""

    noised: Tensor
    epsilon: Tensor
    target: Tensor
    log_snr: Tensor
    noise_cond: Tensor
    loss_weight: Tensor


def random_t(batch_size: int, generator: torch.Generator | None = None) -> Tensor:
    """Training times (batch_size,), uniform over [0.001, 1], as published."""
    return (1 - torch.rand(batch_size, generator=generator)).add(0.001).clamp(0.001, 1.0)


def diffuse(
    x0: Tensor,
    epsilon: Tensor,
    t: Tensor,
    shift: float = 1.0,
    loss_weight: Callable[..., Tensor] | None = None,
    loss_shift: float = 1.0,
) -> Diffused:
    """Noise latents x0 (B, C, H, W) with epsilon (like x0) at times t (B,); returns all that training needs.

    `loss_weight`, by default `p2`, is a function of `loss_weights` or an AdaptiveLossWeight; it is called with
    (log_snr, shift=loss_shift).
    """
    level = log_snr(t, shift).to(x0.device)
    a, b = (per_image(value, x0) for value in alpha_sigma(level))
    x0, epsilon = at_least_float32(x0), at_least_float32(epsilon)
    weight = (loss_weight or p2)(level, shift=loss_shift)
    return Diffused(x0 * a + epsilon * b, epsilon, epsilon, level, noise_cond(level), weight)
