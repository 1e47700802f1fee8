"""One sampling run, from noise to a latent: the same for the hosts, the pipeline, training and benchmarks."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .accelerators import begin_peak, device_name, peak_bytes, synchronize
from .diffusion.noise import NoiseSource
from .diffusion.samplers import SAMPLERS, Callback, Denoise, Noise, add_noise, log_snr_range, masked_denoise
from .diffusion.schedule import at_least_float32, noise_cond
from .errors import CascadeError, quoted

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SamplingRun:
    """What is sampled and how.

    latent       (B, C, h, w), the latent to start from, of which `denoise` and `mask` keep a part
    seed         of the first image; image i draws its noise from (seed + i) mod 2**64
    steps        how many, at least 1
    shift        of the schedule: above 1 spends more of the steps on high noise
    sampler      a key of SAMPLERS
    denoise      the share of the schedule that is run, in (0, 1]; 1 starts from noise alone
    mask         (B or 1, h', w') or (B or 1, 1, h', w'), 1 where the picture may change; None: everywhere
    batch_index  which image of the batch each row is, for its noise; None: 0, 1, …
    """

    latent: Tensor
    seed: int = 0
    steps: int = 20
    shift: float = 1.0
    sampler: str = "ddpm"
    denoise: float = 1.0
    mask: Tensor | None = None
    batch_index: Sequence[int] | None = None

    def log_snrs(self) -> Tensor:
        """(steps + 1,), the levels of noise from the first to the last."""
        return log_snr_range(self.steps, self.shift, self.denoise)

    def noise(self) -> NoiseSource:
        """Each image's own stream of noise; its first draw is the start."""
        indices = list(self.batch_index) if self.batch_index is not None else len(self.latent)
        return NoiseSource(self.seed, indices, tuple(self.latent.shape[1:]))

    def start(self, noise: Tensor) -> Tensor:
        """The noised latent that the first step starts from."""
        return add_noise(self.latent, noise, self.denoise, self.shift)


@torch.no_grad()
def sample(
    run: SamplingRun, predict: Denoise, callback: Callback | None = None, noise: Noise | None = None
) -> Tensor:
    """The sampled latent (B, C, h, w) in float32, on the device of `run.latent`.

    predict(x, log_snr (B,)) gives epsilon like x: a Guider (`by_log_snr`), or a host's own model.
    noise() gives fresh noise like the latent, first for the start; by default the run's own.
    callback is called after each step; what it raises ends the run.
    Raises CascadeError on settings out of range.
    """
    check_sampler(run.sampler)
    levels = run.log_snrs()
    draw = noise or run.noise().draw
    latent = at_least_float32(run.latent)
    first = draw().to(latent)
    start = run.start(first)
    if run.mask is None:
        return SAMPLERS[run.sampler](predict, start, levels, draw, callback)
    mask = mask_like(run.mask, latent)
    sampled = SAMPLERS[run.sampler](
        masked_denoise(mask, latent, first, predict), start, levels, draw, callback
    )
    return torch.lerp(latent, sampled, mask)


def by_log_snr(model: Denoise) -> Denoise:
    """A network or Guider, called as (x, noise_cond), for samplers, which call with (x, log_snr)."""
    return lambda x, log_snr: model(x, noise_cond(log_snr))


def check_sampler(sampler: str, name: str = "sampler") -> None:
    """Raises CascadeError for a sampler that does not exist.  name: of the argument, for messages"""
    if not isinstance(sampler, str) or sampler not in SAMPLERS:
        raise CascadeError(f"{name} is {quoted(sampler)}; choose one of {', '.join(SAMPLERS)}.")


def mask_like(mask: Tensor, latent: Tensor) -> Tensor:
    """A mask of any size and batch as (B, 1, h, w), in [0, 1], for a latent (B, C, h, w)."""
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).to(latent)
    mask = torch.nn.functional.interpolate(mask, size=latent.shape[-2:], mode="bilinear")
    repeats = -(-len(latent) // len(mask))
    return mask.repeat(repeats, 1, 1, 1)[: len(latent)]


@dataclass(frozen=True)
class SamplingResult:
    """A sampled latent, with the run's time and memory.

    latent      (B, C, h, w) float32 on the CPU
    seconds     for all steps, without loading
    peak_bytes  of the device's memory, within the run; 0 where the device does not measure that, such as the CPU
    device      its name
    notices     sentences about settings that a host did not follow
    """

    latent: Tensor
    seconds: float
    peak_bytes: int
    device: str
    notices: tuple[str, ...] = ()


class Stopwatch:
    """Measures time and peak memory of a sampling run, from its construction to `stop`."""

    def __init__(self, device: torch.device):
        self.device = device
        synchronize(device)
        self.measures_peak = begin_peak(device)
        self.start = time.perf_counter()

    def stop(self, latent: Tensor) -> SamplingResult:
        """The run's latent with its figures."""
        synchronize(self.device)
        peak, name = peak_bytes(self.device) if self.measures_peak else 0, str(self.device)
        if self.device.type not in ("cpu", "mps"):
            name = f"{name} {device_name(self.device)}"
        return SamplingResult(latent, time.perf_counter() - self.start, peak, name)


def process_peak() -> int:
    """The greatest number of bytes that this process has had in main memory; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class RunObserver:
    """Receives messages about a run, and may stop it.

    notify             called with a sentence that the user should know, such as a retry in less memory
    check_interrupted  called between steps and tiles; raises Interrupted where the run should stop
    """

    notify: Callable[[str], object] = logger.warning
    check_interrupted: Callable[[], object] = lambda: None
