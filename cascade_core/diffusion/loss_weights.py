"""Loss weights: functions of a log-SNR of any shape, in the same shape, and one that is learned.

The networks predict epsilon, and a weight multiplies its squared error. With x = a·x0 + b·epsilon and SNR = a²/b², an
error in epsilon of one noised latent is an error in x0 by b/a:

    |x0 error|² = |epsilon error|² / SNR        |v error|² = |epsilon error|² · (SNR + 1) / SNR

So a weight w of the error in x0 is w / SNR of that in epsilon. The functions named `x0_…` are such w, as in the
published code: used on the error in epsilon, they do the reverse of what their papers intend (`x0_min_snr` stresses
little noise). `min_snr_gamma`, `debiased`, `p2` and `sech` are weights of the error in epsilon.

`shift` first moves the log-SNR by 2·log(shift), which undoes the shift of a schedule.
"""

import math

import torch
from torch import Tensor, nn

from .schedule import at_least_float32

WEIGHT_RANGE = (-1e9, 1e9)  # of every weight, as published


def constant(log_snr: Tensor, shift: float = 1.0, value: float = 1.0) -> Tensor:
    """A constant weight."""
    return torch.full_like(_unshift(log_snr, shift), value)


def p2(log_snr: Tensor, shift: float = 1.0, k: float = 1.0, gamma: float = 1.0, s: float = 1.0) -> Tensor:
    """(k + SNR^s)^-gamma.  Choi et al. 2022, arXiv 2204.00227.

    With the defaults, 1 / (1 + SNR) = sigmoid(-log_snr), the sigmoid weight of Kingma & Gao 2023 (arXiv 2303.00848).
    """
    return ((k + (_unshift(log_snr, shift) * s).exp()) ** -gamma).clamp(*WEIGHT_RANGE)


def min_snr_gamma(log_snr: Tensor, shift: float = 1.0, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma) / SNR.  Hang et al. 2023, arXiv 2303.09556, section 3.4: min(SNR, gamma) on the error in x0."""
    return (gamma * (-_unshift(log_snr, shift)).exp()).clamp(max=1.0)


def debiased(log_snr: Tensor, shift: float = 1.0) -> Tensor:
    """1 / sqrt(SNR).  Yu et al. 2023, arXiv 2310.08442."""
    return (1 / _unshift(log_snr, shift).exp().sqrt()).clamp(*WEIGHT_RANGE)


def sech(log_snr: Tensor, shift: float = 1.0, div: float = 2.0) -> Tensor:
    """1 / cosh(log_snr / div), the density of the cosine schedule's log-SNR.  Kingma & Gao 2023, arXiv 2303.00848."""
    return 1 / (_unshift(log_snr, shift) / div).cosh()


def x0_snr(log_snr: Tensor, shift: float = 1.0) -> Tensor:
    """SNR. As a weight on the error in x0: the plain loss on epsilon."""
    return _unshift(log_snr, shift).exp().clamp(*WEIGHT_RANGE)


def x0_snr_plus_one(log_snr: Tensor, shift: float = 1.0) -> Tensor:
    """SNR + 1. As a weight on the error in x0: the plain loss on v.  Salimans & Ho 2022, arXiv 2202.00512."""
    return (_unshift(log_snr, shift).exp() + 1).clamp(*WEIGHT_RANGE)


def x0_min_snr(log_snr: Tensor, shift: float = 1.0, max_snr: float = 5.0) -> Tensor:
    """min(SNR, max_snr).  Hang et al. 2023, arXiv 2303.09556."""
    return _unshift(log_snr, shift).exp().clamp(max=max_snr)


def x0_min_snr_plus_one(log_snr: Tensor, shift: float = 1.0, max_snr: float = 5.0) -> Tensor:
    """min(SNR + 1, max_snr)."""
    return (_unshift(log_snr, shift).exp() + 1).clamp(max=max_snr)


def x0_truncated_snr(log_snr: Tensor, shift: float = 1.0, min_snr: float = 1.0) -> Tensor:
    """max(SNR, min_snr).  Salimans & Ho 2022, arXiv 2202.00512."""
    return _unshift(log_snr, shift).exp().clamp(min=min_snr, max=WEIGHT_RANGE[1])


def x0_sigmoid(log_snr: Tensor, shift: float = 1.0, s: float = 1.0) -> Tensor:
    """sigmoid(s · log_snr). As a weight on the error in x0, at s = 1: Kingma & Gao's `p2` weight on epsilon."""
    return (_unshift(log_snr, shift) * s).sigmoid()


def _unshift(log_snr: Tensor, shift: float) -> Tensor:
    level = at_least_float32(log_snr)
    return level if shift == 1.0 else level + 2 * math.log(shift)


class AdaptiveLossWeight(nn.Module):
    """Reciprocal of the running loss at this log-SNR, kept in buckets.

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
        """Moves each bucket that was hit towards its loss.  log_snr, loss: (B,), one per image.

        Where several images fall into one bucket, their mean is used once (in the published code, only the last image).
        """
        bucket = self._bucket(at_least_float32(log_snr)).to(self.bucket_losses.device)
        loss, nothing = loss.to(self.bucket_losses), torch.zeros_like(self.bucket_losses)
        total = nothing.index_add(0, bucket, loss)
        hits = nothing.index_add(0, bucket, torch.ones_like(loss))
        moved = self.bucket_losses * beta + total / hits.clamp(min=1) * (1 - beta)
        self.bucket_losses.copy_(torch.where(hits > 0, moved, self.bucket_losses))

    def _bucket(self, log_snr: Tensor) -> Tensor:
        return torch.searchsorted(self.bucket_ranges.to(log_snr.device), log_snr)
