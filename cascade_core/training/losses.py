"""Losses of a network that predicts noise: diffusion, and consistency distillation. Latents are (B, C, h, w)."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..diffusion.forward_process import diffuse, random_t
from ..diffusion.loss_weights import AdaptiveLossWeight, debiased
from ..diffusion.schedule import alpha_sigma, log_snr, log_snr_limits, noise_cond, per_image, undiffuse


def diffusion_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    max_loss_weight: float | None = 16.0,
    pure_noise_share: float = 0.05,
    loss_weight: Callable[..., Tensor] = debiased,
    shift: float = 1.0,
    t_range: tuple[float, ...] = (0.0, 1.0),
    noise_offset: float = 0.0,
    multires_noise: float = 0.0,
    huber: float | None = None,
    picture_weights: Tensor | None = None,
    masks: Tensor | None = None,
    pyramid: bool = False,
) -> dict[str, Tensor]:
    """Weighted error of the predicted noise: predict(noised, noise_cond) against epsilon.

    Every run starts from pure noise, where an error in epsilon is an error in x0 a hundred times as large; so the
    default weight is the debiased one, clamped to `max_loss_weight`, and `pure_noise_share` of the batch is taken at
    t = 1 itself. The published training has neither: p2, no clamp, no share. An AdaptiveLossWeight is updated with the
    errors.

    t_range: bounds of the times; noise_offset, multires_noise: arguments of `training_noise`; huber: the delta of
    `pseudo_huber`, which then replaces the square. picture_weights: (B,), of each row; None: all 1. masks: (B, h, w),
    the weight of each position; None: all 1. pyramid: use `pyramid_noise`.
    """
    t = random_t(len(x0)).to(x0.device)
    if t_range != (0.0, 1.0):
        t = t_range[0] + (t_range[1] - t_range[0]) * t
    t[: int(pure_noise_share * len(x0))] = 1.0
    noise = pyramid_noise(x0) if pyramid else training_noise(x0, noise_offset, multires_noise)
    diffused = diffuse(x0, noise, t, shift, loss_weight)
    difference = predict(diffused.noised, diffused.noise_cond).float() - diffused.target
    squares = difference.square() if huber is None else pseudo_huber(difference, huber)
    if masks is not None:
        squares = squares * masks[:, None]
    error = squares.mean(dim=(1, 2, 3))  # (B,)
    if isinstance(loss_weight, AdaptiveLossWeight):
        loss_weight.update_buckets(diffused.log_snr, error.detach())
    weight = _clamp(diffused.loss_weight, max_loss_weight)
    if picture_weights is not None:
        weight = weight * picture_weights
    return {"loss": (error * weight).mean(), "epsilon": error.mean()}


def training_noise(x0: Tensor, offset: float = 0.0, multires: float = 0.0) -> Tensor:
    """Gaussian noise like x0 (B, C, h, w).

    offset: strength of added noise that is constant over a channel's positions (crosslabs.org, "Diffusion with Offset
    Noise", 2023). multires: strength of added noise at half the resolution; at a quarter it is squared, and so on;
    the sum is scaled to a standard deviation of 1 (wandb.ai, "Multi-Resolution Noise for Diffusion Model Training").
    """
    noise = torch.randn_like(x0)
    strength, (height, width) = multires, x0.shape[-2:]
    while multires and min(height, width) > 1:
        height, width = height // 2, width // 2
        coarse = torch.randn(*x0.shape[:2], height, width, device=x0.device, dtype=x0.dtype)
        noise = noise + strength * F.interpolate(coarse, x0.shape[-2:], mode="bilinear")
        strength *= multires
    if multires:
        noise = noise / noise.std(dim=(1, 2, 3), keepdim=True)
    if offset:
        noise = noise + offset * torch.randn(*x0.shape[:2], 1, 1, device=x0.device, dtype=x0.dtype)
    return noise


def pyramid_noise(x0: Tensor, largest: int = 16, decay: float = 0.75) -> Tensor:
    """Gaussian noise like x0 (B, C, h, w) with added noise of lower resolutions, as in Stage B's published training.

    To the noise of each position is added square noise of a half, a quarter, … of the height, where at most `largest`
    rows are left, enlarged without smoothing and weighted by decay^level; the variance is scaled to 1.
    """
    noise, variance = torch.randn_like(x0), 1.0
    for level in range(1, 10):
        side = x0.shape[-2] // 2**level
        if 1 <= side <= largest:
            coarse = torch.randn(*x0.shape[:2], side, side, device=x0.device, dtype=x0.dtype)
            noise = noise + decay**level * F.interpolate(coarse, x0.shape[-2:])
            variance += decay ** (2 * level)
        if side <= 1:
            break
    return noise / variance**0.5


def pseudo_huber(difference: Tensor, delta: float) -> Tensor:
    """2·δ·(sqrt(d² + δ²) − δ): d² where d is small beside δ, 2·δ·|d| where it is large."""
    squares = difference.square()
    # Rewritten without the difference of two near numbers, which would lose digits.
    return 2 * delta * squares / ((squares + delta**2).sqrt() + delta)


def consistency_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    teacher: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    solver_steps: int = 50,
    max_loss_weight: float | None = 16.0,
    pure_noise_share: float = 0.05,
    loss_weight: Callable[..., Tensor] = debiased,
    shift: float = 1.0,
    student_steps: int | None = None,
    on_policy_share: float = 0.0,
) -> dict[str, Tensor]:
    """Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378 and 2311.05556).

    The teacher's path is cut into `solver_steps`. At the start of each step, the student learns to predict the end of
    the path as it predicts it itself from the end of that step. With `student_steps`, it is trained only at the times
    of that many steps of the `lcm` sampler (Heek et al. 2024, arXiv 2403.06807): there is less to learn, and the
    prediction at pure noise is bootstrapped from the teacher in `student_steps` jumps instead of `solver_steps`.

    teacher: the guided prediction, (noised, noise_cond) -> epsilon. The student's x0 is computed as in `lcm`, without
    a skip connection, so that at the end of the path it is the teacher's own. The target comes from the student's
    current weights, without gradient (Song & Dhariwal 2023, arXiv 2310.14189, section 3.2). The error is weighed as
    in `diffusion_loss`, as an error in epsilon.
    on_policy_share: the share of the batch whose x0 is the student's own, after one step of `lcm` from one time back,
    instead of the picture's (Kohler et al. 2024, arXiv 2405.05224): the student then learns to correct its own errors.
    """
    student_steps = student_steps or solver_steps
    step = torch.randint(1, student_steps + 1, (len(x0),))
    step[: int(pure_noise_share * len(x0))] = student_steps
    if on_policy_share:
        x0 = _on_policy(predict, x0, step, student_steps, on_policy_share, shift)
    levels = path_levels(
        [snr.to(x0.device) for snr in jump_log_snrs(step, student_steps, solver_steps, shift)]
    )
    level = levels[0].log_snr
    a, b = (per_image(value, x0) for value in alpha_sigma(level))
    x = a * x0 + b * torch.randn_like(x0)
    weight = _clamp(loss_weight(level), max_loss_weight)
    return consistency_terms(predict, teacher, x, levels, weight, (step == 1).to(x0.device))


class PathLevel(NamedTuple):
    """A noise level on a teacher's path, for each row.

    ratio: the length of the step from here over twice that of the step before, in log-SNR; 0 in a step of first order.
    """

    log_snr: Tensor  # (B,), as the others
    noise_cond: Tensor
    ratio: Tensor


def jump_log_snrs(step: Tensor, student_steps: int, solver_steps: int, shift: float = 1.0) -> list[Tensor]:
    """Log-SNRs (B,) along the student's steps (B,), which are counted from 1 at the clean end.

    One more than the teacher takes steps in a student's.
    """
    jump = solver_steps // student_steps
    times = [(step - i / jump) / student_steps for i in range(jump)] + [(step - 1) / student_steps]
    return [log_snr(time, shift) for time in times]


def path_levels(log_snrs: Sequence[Tensor]) -> list[PathLevel]:
    """Levels for `along_path`. The steps are those of the `dpmpp_2m` sampler: the first, and one that ends in the
    clean picture, are of first order.
    """
    clean = log_snr_limits()[1]
    ratios = [torch.zeros_like(snr) for snr in log_snrs]
    for i, (before, here, there) in enumerate(zip(log_snrs, log_snrs[1:], log_snrs[2:], strict=False), 1):
        ratios[i] = torch.where(there < clean, (there - here) / (2 * (here - before)), 0.0)
    return [PathLevel(snr, noise_cond(snr), ratio) for snr, ratio in zip(log_snrs, ratios, strict=True)]


def consistency_terms(
    predict: Callable[[Tensor, Tensor], Tensor],
    teacher: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    levels: Sequence[PathLevel],
    weight: Tensor,
    ends_clean: Tensor,
) -> dict[str, Tensor]:
    """`consistency_loss` of what it draws: latents x at the first of the levels of their jumps. No randomness.

    weight: (B,); ends_clean: (B,), whether a row's jump ends in the clean picture
    """
    here, there = levels[0], levels[-1]
    a, b = (per_image(value, x) for value in alpha_sigma(here.log_snr))
    with torch.no_grad():
        x_next, end = along_path(teacher, x, levels)
        predicted = undiffuse(x_next, there.log_snr, predict(x_next, there.noise_cond).float())
        end = torch.where(per_image(ends_clean, x), end, predicted)
        target = (x - a * end) / b
    error = (predict(x, here.noise_cond).float() - target).square().mean(dim=(1, 2, 3))  # (B,)
    return {"loss": (error * weight).mean(), "epsilon": error.mean()}


@torch.no_grad()
def _on_policy(
    predict: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    step: Tensor,
    student_steps: int,
    share: float,
    shift: float,
) -> Tensor:
    """x0, or in the batch's last `share`, the student's x0 from one step closer to the noise, if there is one."""
    level = log_snr((step + 1).clamp(max=student_steps) / student_steps, shift).to(x0.device)
    a, b = (per_image(value, x0) for value in alpha_sigma(level))
    x = a * x0 + b * torch.randn_like(x0)
    predicted = undiffuse(x, level, predict(x, noise_cond(level)).float())
    on_policy = (torch.arange(len(x0)) >= (1 - share) * len(x0)) & (step < student_steps)
    return torch.where(per_image(on_policy, x0).to(x0.device), predicted, x0)


def along_path(
    teacher: Callable[[Tensor, Tensor], Tensor], x: Tensor, levels: Sequence[PathLevel]
) -> tuple[Tensor, Tensor]:
    """Follows the teacher's path from x; returns its end, and the x0 predicted in its last step."""
    x0 = before = x  # replaced in the first step
    for i, (here, there) in enumerate(pairwise(levels)):
        before, x0 = x0, undiffuse(x, here.log_snr, teacher(x, here.noise_cond))
        data = x0 + per_image(here.ratio, x) * (x0 - before) if i else x0
        (a, b), (a_next, b_next) = (
            [per_image(v, x) for v in alpha_sigma(level.log_snr)] for level in (here, there)
        )
        x = b_next / b * x + (a_next - a * b_next / b) * data
    return x, x0


def _clamp(weight: Tensor, maximum: float | None) -> Tensor:
    return weight if maximum is None else weight.clamp(max=maximum)
