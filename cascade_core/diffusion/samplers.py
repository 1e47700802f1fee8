"""Samplers as free functions over a list of log-SNRs, and `log_snr_range`, which builds that list.

Arguments of every sampler:
    denoise    (x, log_snr (B,) on the CPU, where reading it needs no device sync) -> predicted epsilon like x; may be
               called more than once a step
    x          (B, C, H, W), the noised latent at log_snrs[0]; never written to
    log_snrs   (steps + 1,), where the latent is before the first step and after each one
    noise      () -> fresh noise like x; called once a step by ddpm and lcm, never by ddim and dpmpp_2m
    callback   called with a SamplerStep after each step; what it raises ends the run
A sampler returns the latent at log_snrs[-1].  The latent is float32 (float64 where x is) whatever the model is.
Neighbouring log-SNRs may be equal: the schedule's limits cut off both ends of a long or shifted run.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import CascadeError
from .schedule import alpha_sigma, at_least_float32, per_image, undiffuse
from .schedule import log_snr as schedule

Denoise = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class SamplerStep:
    """A finished step.

    index    from 0 to steps - 1
    x        (B, C, H, W), the latent after the step, at log-SNR `log_snr`
    x0       (B, C, H, W), the clean latent that this step predicted: what a preview shows
    """

    index: int
    steps: int
    x: Tensor
    x0: Tensor
    log_snr: float


Callback = Callable[[SamplerStep], object]


def ddpm(
    denoise: Denoise, x: Tensor, log_snrs: Tensor, noise: Noise, callback: Callback | None = None
) -> Tensor:
    """Ancestral sampling.  Ho et al. 2020, arXiv 2006.11239; here as eq. 16 of DDIM with eta = 1."""
    x, levels = _begin(x, log_snrs)
    for index, (level, following) in enumerate(pairwise(levels)):
        x0, epsilon = _predict(denoise, x, level)
        (a, b), (a_next, b_next) = alpha_sigma(level), alpha_sigma(following)
        # Where the level hardly changes, rounding can make both differences negative.
        sigma = (b_next**2 / b**2).sqrt() * (1 - a**2 / a_next**2).clamp(min=0).sqrt()
        direction = (b_next**2 - sigma**2).clamp(min=0).sqrt()
        x = a_next * x0 + direction * epsilon + sigma * _fresh(noise, x)
        _report(callback, index, levels, x, x0)
    return x


def ddim(
    denoise: Denoise, x: Tensor, log_snrs: Tensor, noise: Noise, callback: Callback | None = None
) -> Tensor:
    """Deterministic, first order.  Song et al. 2021, arXiv 2010.02502, eq. 12 with sigma = 0."""
    x, levels = _begin(x, log_snrs)
    for index, (level, following) in enumerate(pairwise(levels)):
        x0, epsilon = _predict(denoise, x, level)
        a_next, b_next = alpha_sigma(following)
        x = a_next * x0 + b_next * epsilon
        _report(callback, index, levels, x, x0)
    return x


def lcm(
    denoise: Denoise, x: Tensor, log_snrs: Tensor, noise: Noise, callback: Callback | None = None
) -> Tensor:
    """Multistep consistency sampling: predict x0, noise it anew.  Luo et al. 2023, arXiv 2310.04378."""
    x, levels = _begin(x, log_snrs)
    for index, (level, following) in enumerate(pairwise(levels)):
        x0, _ = _predict(denoise, x, level)
        a_next, b_next = alpha_sigma(following)
        x = x0 * a_next + _fresh(noise, x) * b_next
        _report(callback, index, levels, x, x0)
    return x


def dpmpp_2m(
    denoise: Denoise, x: Tensor, log_snrs: Tensor, noise: Noise, callback: Callback | None = None
) -> Tensor:
    """DPM-Solver++(2M): deterministic, second order.  Lu et al. 2022, arXiv 2211.01095, algorithm 2.

    The first and the last step are of first order, where it equals DDIM.  The paper's lambda is half the
    log-SNR; only the ratio of two steps in lambda counts, so that log-SNR serves as well.
    """
    x, levels = _begin(x, log_snrs)
    x0_before = h_before = None  # of the last step that moved
    for index, (level, following) in enumerate(pairwise(levels)):
        x0, _ = _predict(denoise, x, level)
        (a, b), (a_next, b_next) = alpha_sigma(level), alpha_sigma(following)
        h = following - level
        data = x0
        if x0_before is not None and h_before is not None and index < len(levels) - 2:
            data = x0 + (x0 - x0_before) * (h / (2 * h_before))
        keep = b_next / b
        x = keep * x + (a_next - a * keep) * data
        if h != 0:
            x0_before, h_before = x0, h
        _report(callback, index, levels, x, x0)
    return x


Sampler = Callable[[Denoise, Tensor, Tensor, Noise, Callback | None], Tensor]
SAMPLERS: dict[str, Sampler] = {"ddpm": ddpm, "ddim": ddim, "lcm": lcm, "dpmpp_2m": dpmpp_2m}


def log_snr_range(steps: int, shift: float, t_start: float = 1.0, t_end: float = 0.0) -> Tensor:
    """The log-SNRs (steps + 1,) of even steps of time from `t_start` to `t_end`, in float32 on the CPU."""
    if steps < 1:
        raise CascadeError(f"steps is {steps}; at least 1 is needed.")
    _check_time_and_shift(t_start, shift)
    if not 0 <= t_end < t_start:
        raise CascadeError(f"t_end is {t_end}; it must be at least 0 and below t_start ({t_start}).")
    return schedule(torch.linspace(t_start, t_end, steps + 1, dtype=torch.float32, device="cpu"), shift)


def add_noise(latent: Tensor, noise: Tensor, t_start: float, shift: float) -> Tensor:
    """Noises a latent (B, C, H, W) to `t_start`, from which a sampler goes on (image to image).

    At t_start = 1 the noise has full strength instead of its weight b = 0.99995, so that an empty latent (zeros)
    gives the published start of text to image: the noise itself.
    """
    _check_time_and_shift(t_start, shift)
    if noise.shape != latent.shape:
        raise _wrong_noise(noise, latent)
    a, b = alpha_sigma(schedule(torch.tensor(t_start, dtype=torch.float32, device="cpu"), shift))
    latent = at_least_float32(latent)
    noise = noise.to(latent)
    return latent * a + (noise if t_start == 1 else noise * b)


def masked_denoise(mask: Tensor, latent: Tensor, noise: Tensor, denoise: Denoise) -> Denoise:
    """Wraps `denoise` for inpainting: outside the mask the network sees, and predicts, the original latent.

    mask: (B, 1, h, w), 1 where the picture may change; latent, noise: (B, C, h, w).
    """

    def blended(x: Tensor, log_snr: Tensor) -> Tensor:
        level = log_snr.to(x.device)
        a, b = (per_image(value, x) for value in alpha_sigma(level))
        visible = torch.lerp(a * latent + b * noise, x, mask)
        x0 = torch.lerp(latent, undiffuse(visible, level, denoise(visible, log_snr)), mask)
        return (x - a * x0) / b  # the epsilon that leads from the sampler's own x to this x0

    return blended


def _check_time_and_shift(t_start: float, shift: float) -> None:
    if not 0 < t_start <= 1:
        raise CascadeError(f"t_start is {t_start}; it must be above 0 and at most 1 (pure noise).")
    if not (math.isfinite(shift) and shift > 0):
        raise CascadeError(f"shift is {shift}; it must be a finite number above 0 (Stage C 2, Stage B 1).")


def _begin(x: Tensor, log_snrs: Tensor) -> tuple[Tensor, Tensor]:
    """The latent in working precision, and the levels on the CPU, where reading one needs no device sync."""
    return at_least_float32(x), at_least_float32(log_snrs).cpu()


def _predict(denoise: Denoise, x: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """(x0, epsilon), each like x, predicted by the model at this level."""
    epsilon = denoise(x, level.expand(len(x))).to(x.dtype)
    return undiffuse(x, level, epsilon), epsilon


def _fresh(noise: Noise, x: Tensor) -> Tensor:
    drawn = noise()
    if drawn.shape != x.shape:  # broadcasting would give several images the same noise
        raise _wrong_noise(drawn, x)
    if x.is_cuda and not drawn.is_cuda:
        # From pageable memory, the copy would make the host wait for the forward before it.
        return drawn.pin_memory().to(x, non_blocking=True)
    return drawn.to(x)


def _wrong_noise(noise: Tensor, x: Tensor) -> CascadeError:
    return CascadeError(
        f"noise has shape {tuple(noise.shape)}; it must be that of the latent, {tuple(x.shape)}."
    )


def _report(callback: Callback | None, index: int, levels: Tensor, x: Tensor, x0: Tensor) -> None:
    if callback is not None:
        callback(SamplerStep(index, len(levels) - 1, x, x0, levels[index + 1].item()))
