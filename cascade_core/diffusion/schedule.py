"""The diffusion process of Stable Cascade as pure functions of time and log-SNR.

A latent at time t in [0, 1] (0: clean, 1: noise) is `a·x0 + b·epsilon` with a² + b² = 1, and its log-SNR is
log(a² / b²).  The networks predict epsilon.  Everything is computed in float32, or in float64 where given it.

Sources: cosine schedule, Nichol & Dhariwal 2021 (arXiv 2102.09672, section 3.2); its shift in log-SNR,
Hoogeboom et al. 2023 (arXiv 2301.11093); constants and order of operations, the published GDF code.
"""

import math
from functools import cache

import torch
from torch import Tensor

COSINE_OFFSET = 0.008  # s of the cosine schedule
VARIANCE_RANGE = (0.0001, 0.9999)  # a² never leaves this range


def log_snr(t: Tensor, shift: float = 1.0) -> Tensor:
    """Log-SNR of the cosine schedule at times t in [0, 1], any shape.

    `shift` moves it by 2·log(1 / shift), so a shift above 1 means more noise at the same t; the result stays
    within the limits of the schedule without shift.
    """
    shifted = _cosine_log_snr(at_least_float32(t))
    if shift != 1.0:
        shifted = shifted + 2 * math.log(1 / shift)
    return shifted.clamp(*log_snr_limits())


@cache
def log_snr_limits() -> tuple[float, float]:
    """(lowest, highest) log-SNR: about -9.2102 at t = 1 and 9.2102 at t = 0, rounded to float32."""
    lowest, highest = _cosine_log_snr(torch.tensor([1.0, 0.0], device="cpu")).tolist()
    return lowest, highest


def alpha_sigma(log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b), the variance-preserving weights of the clean latent and of the noise at this log-SNR; a² + b² = 1."""
    a_squared = at_least_float32(log_snr).sigmoid()
    return a_squared.sqrt(), (1 - a_squared).sqrt()


def noise_cond(log_snr: Tensor, shift: float = 1.0) -> Tensor:
    """The network's noise condition: the t in [0, 1] at which the unshifted cosine schedule has this log-SNR.

    Pass a log-SNR from a shifted schedule unchanged; `shift` would first undo a shift.
    """
    level = at_least_float32(log_snr)
    if shift != 1.0:
        level = level + 2 * math.log(shift)
    s, first_variance = _cosine_constants(level.device)
    angle = ((level.sigmoid() * first_variance) ** 0.5).acos()
    return (angle / (torch.pi * 0.5) * (1 + s) - s).clamp(0, 1)


def _cosine_log_snr(t: Tensor) -> Tensor:
    s, first_variance = _cosine_constants(t.device)
    angle = (s + t.clamp(0, 1)) / (1 + s) * torch.pi * 0.5
    variance = (angle.cos().clamp(0, 1) ** 2 / first_variance).clamp(*VARIANCE_RANGE)
    return (variance / (1 - variance)).log()


def _cosine_constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """(s, cos² at t = 0) in float32 as published: double constants would round t and log-SNR differently."""
    s = torch.tensor(COSINE_OFFSET, device=device, dtype=torch.float32)
    return s, (s / (1 + s) * torch.pi * 0.5).cos() ** 2


def undiffuse(x: Tensor, log_snr: Tensor, epsilon: Tensor) -> Tensor:
    """The clean latent x0 that follows from a predicted epsilon.  x, epsilon: (B, C, H, W); log_snr: (B,) or ()"""
    a, b = (per_image(value, x) for value in alpha_sigma(log_snr))
    return (at_least_float32(x) - at_least_float32(epsilon) * b) / a


def at_least_float32(values: Tensor) -> Tensor:
    """Casts to float32; float64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, …) with as many dimensions as `like`; a scalar () stays a scalar."""
    return values if values.dim() == 0 else values.reshape(-1, *[1] * (like.dim() - 1))
