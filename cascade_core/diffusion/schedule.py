"""The diffusion process of Stable Cascade as pure functions of time and log-SNR.

A latent at time t in [0, 1] (0: clean, 1: noise) is `a·x0 + b·epsilon` with a² + b² = 1, and its log-SNR is
log(a² / b²).  The networks predict epsilon.  Everything is computed in float32, or in float64 where given it.

Sources: cosine schedule, Nichol & Dhariwal 2021 (arXiv 2102.09672, section 3.2); its shift in log-SNR,
Hoogeboom et al. 2023 (arXiv 2301.11093); constants and order of operations, the published GDF code.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

COSINE_OFFSET = 0.008  # s of the cosine schedule
VARIANCE_RANGE = (0.0001, 0.9999)  # a² never leaves this range
WEIGHT_RANGE = (-1e9, 1e9)  # of every loss weight, as published


class Diffused(NamedTuple):
    """What `diffuse` returns.  Latents are (B, C, H, W), the rest (B,)."""

    noised: Tensor
    epsilon: Tensor
    target: Tensor
    log_snr: Tensor
    noise_cond: Tensor
    loss_weight: Tensor


# Schedule


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
    """(lowest, highest) log-SNR: about -9.2102 at t = 1 and 9.2102 at t = 0, rounded as float32 has it."""
    lowest, highest = _cosine_log_snr(torch.tensor([1.0, 0.0], device="cpu")).tolist()
    return lowest, highest


def scale(log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b), the variance-preserving weights of the clean latent and of the noise at this log-SNR."""
    a_squared = at_least_float32(log_snr).sigmoid()
    return a_squared.sqrt(), (1 - a_squared).sqrt()


def noise_cond(log_snr: Tensor, shift: float = 1.0) -> Tensor:
    """The time that the network is told: the t of the unshifted cosine schedule with this log-SNR, in [0, 1].

    A log-SNR from a shifted schedule is passed as it is; `shift` here undoes a shift first.
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


# Noising


def diffuse(
    x0: Tensor,
    epsilon: Tensor,
    t: Tensor,
    shift: float = 1.0,
    loss_weight: Callable[..., Tensor] | None = None,
    loss_shift: float = 1.0,
) -> Diffused:
    """Noise latents x0 (B, C, H, W) with epsilon (like x0) at times t (B,); returns all that training needs.

    `loss_weight`, by default `p2`, is one of the functions below or an AdaptiveLossWeight; it is called with
    (log_snr, shift=loss_shift).
    """
    level = log_snr(t, shift).to(x0.device)
    a, b = (per_image(value, x0) for value in scale(level))
    x0, epsilon = at_least_float32(x0), at_least_float32(epsilon)
    weight = (loss_weight or p2)(level, shift=loss_shift)
    return Diffused(x0 * a + epsilon * b, epsilon, epsilon, level, noise_cond(level), weight)


def undiffuse(x: Tensor, log_snr: Tensor, epsilon: Tensor) -> Tensor:
    """The clean latent x0 that a predicted epsilon means.  x, epsilon: (B, C, H, W); log_snr: (B,) or ()"""
    a, b = (per_image(value, x) for value in scale(log_snr))
    return (at_least_float32(x) - at_least_float32(epsilon) * b) / a


def random_t(batch_size: int, generator: torch.Generator | None = None) -> Tensor:
    """Training times (batch_size,), uniform over [0.001, 1], as published."""
    return (1 - torch.rand(batch_size, generator=generator)).add(0.001).clamp(0.001, 1.0)


def at_least_float32(values: Tensor) -> Tensor:
    """The same values in float32, or in float64 where they are already."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, …) with as many dimensions as `like`; a scalar () stays a scalar."""
    return values if values.dim() == 0 else values.reshape(-1, *[1] * (like.dim() - 1))


# Loss weights: functions of a log-SNR of any shape.  `shift` first moves it by 2·log(shift), which undoes the
# shift of a schedule.


def constant(log_snr: Tensor, shift: float = 1.0, value: float = 1.0) -> Tensor:
    """The same weight everywhere."""
    return torch.full_like(_unshift(log_snr, shift), value)


def snr(log_snr: Tensor, shift: float = 1.0) -> Tensor:
    """The SNR itself: with an epsilon target, the loss on x0."""
    return _unshift(log_snr, shift).exp().clamp(*WEIGHT_RANGE)


def p2(log_snr: Tensor, shift: float = 1.0, k: float = 1.0, gamma: float = 1.0, s: float = 1.0) -> Tensor:
    """(k + SNR^s)^-gamma.  Choi et al. 2022, arXiv 2204.00227."""
    return ((k + (_unshift(log_snr, shift) * s).exp()) ** -gamma).clamp(*WEIGHT_RANGE)


def snr_plus_one(log_snr: Tensor, shift: float = 1.0) -> Tensor:
    """SNR + 1.  Salimans & Ho 2022, arXiv 2202.00512."""
    return (_unshift(log_snr, shift).exp() + 1).clamp(*WEIGHT_RANGE)


def min_snr(log_snr: Tensor, shift: float = 1.0, max_snr: float = 5.0) -> Tensor:
    """min(SNR, max_snr).  Hang et al. 2023, arXiv 2303.09556."""
    return _unshift(log_snr, shift).exp().clamp(max=max_snr)


def min_snr_plus_one(log_snr: Tensor, shift: float = 1.0, max_snr: float = 5.0) -> Tensor:
    """min(SNR + 1, max_snr)."""
    return (_unshift(log_snr, shift).exp() + 1).clamp(max=max_snr)


def truncated_snr(log_snr: Tensor, shift: float = 1.0, min_snr: float = 1.0) -> Tensor:
    """max(SNR, min_snr).  Salimans & Ho 2022, arXiv 2202.00512."""
    return _unshift(log_snr, shift).exp().clamp(min=min_snr, max=WEIGHT_RANGE[1])


def sech(log_snr: Tensor, shift: float = 1.0, div: float = 2.0) -> Tensor:
    """1 / cosh(log_snr / div).  Kingma & Gao 2023, arXiv 2303.00848."""
    return 1 / (_unshift(log_snr, shift) / div).cosh()


def debiased(log_snr: Tensor, shift: float = 1.0) -> Tensor:
    """1 / sqrt(SNR).  Yu et al. 2023, arXiv 2310.08442."""
    return (1 / _unshift(log_snr, shift).exp().sqrt()).clamp(*WEIGHT_RANGE)


def sigmoid(log_snr: Tensor, shift: float = 1.0, s: float = 1.0) -> Tensor:
    """sigmoid(s · log_snr).  Kingma & Gao 2023, arXiv 2303.00848."""
    return (_unshift(log_snr, shift) * s).sigmoid()


def _unshift(log_snr: Tensor, shift: float) -> Tensor:
    level = at_least_float32(log_snr)
    return level if shift == 1.0 else level + 2 * math.log(shift)


class AdaptiveLossWeight(nn.Module):
    """One over the running loss at this log-SNR, kept in buckets.

    The buckets are buffers, so that a resumed run goes on with them.
    """

    bucket_ranges: Tensor  # (buckets - 1,) inner borders; the first and the last bucket are open
    bucket_losses: Tensor  # (buckets,)

    def __init__(
        self,
        log_snr_range: tuple[float, float] = (-10.0, 10.0),
        buckets: int = 300,
        weight_range: tuple[float, float] = (1e-7, 1e7),
    ):
        super().__init__()
        self.weight_range = weight_range
        self.register_buffer("bucket_ranges", torch.linspace(*log_snr_range, buckets - 1))
        self.register_buffer("bucket_losses", torch.ones(buckets))

    def forward(self, log_snr: Tensor, shift: float = 1.0) -> Tensor:
        """log_snr: (B,) -> weights (B,)"""
        losses = self.bucket_losses.to(log_snr.device)[self._bucket(_unshift(log_snr, shift))]
        return (1 / losses).clamp(*self.weight_range)

    @torch.no_grad()
    def update_buckets(self, log_snr: Tensor, loss: Tensor, beta: float = 0.99) -> None:
        """Move each bucket that was hit towards its loss.  log_snr, loss: (B,), one per image.

        Where several images fall into one bucket their mean counts once (published: the last one alone).
        """
        bucket = self._bucket(at_least_float32(log_snr)).to(self.bucket_losses.device)
        loss, nothing = loss.to(self.bucket_losses), torch.zeros_like(self.bucket_losses)
        total = nothing.index_add(0, bucket, loss)
        hits = nothing.index_add(0, bucket, torch.ones_like(loss))
        moved = self.bucket_losses * beta + total / hits.clamp(min=1) * (1 - beta)
        self.bucket_losses.copy_(torch.where(hits > 0, moved, self.bucket_losses))

    def _bucket(self, log_snr: Tensor) -> Tensor:
        return torch.searchsorted(self.bucket_ranges.to(log_snr.device), log_snr)
