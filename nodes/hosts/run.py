"""What both hosts need to know of one sampling run, and of a MODEL."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...cascade_core.diffusion.noise import NoiseSource
from ...cascade_core.diffusion.samplers import log_snr_range

NON_FINITE_WEIGHT = "The weight {weight} holds NaN or infinity; download the file again."


def least_side(kind: str, config: Any) -> int:
    """The side of the smallest latent that a network can take: Stage B halves it from level to level."""
    return config.patch_size * 2 ** (len(config.c_hidden) - 1) if kind == "stage_b" else 1


@dataclass(frozen=True)
class Network:
    """What a MODEL holds.

    kind      stage_c, stage_b, or None for any other model
    name      in words, for messages, such as "a Stage B model"
    widths    of its inputs: text, pooled, image (absent where it takes none)
    channels  of its latent
    least     the side of the smallest latent that it can take
    """

    kind: str | None
    name: str
    widths: dict[str, int]
    channels: int = 0
    least: int = 1


@dataclass(frozen=True)
class Run:
    """One sampling run.

    samples      (B, C, h, w), the latent in socket units; what is kept of it depends on denoise
    noise_mask   (B or 1, h', w') or (B or 1, 1, h', w'), 1 where the picture may change, or None
    batch_index  which image of the batch each row is, for its noise
    denoise      the share of the schedule that is run, in (0, 1]
    tile         of Stage B: the side of a tile in latent positions, 0: whole
    engine       whether the engine is used where it can be
    """

    kind: str
    model: Any
    positive: list
    negative: list
    samples: Tensor
    noise_mask: Tensor | None
    batch_index: Sequence[int] | None
    seed: int
    steps: int
    cfg: float
    cfg_rescale: float
    shift: float
    sampler: str
    denoise: float
    tile: int = 0
    engine: bool = True

    def log_snrs(self) -> Tensor:
        """(steps + 1,), the levels of noise from the first to the last."""
        return log_snr_range(self.steps, self.shift, self.denoise)

    def noise(self) -> NoiseSource:
        """Each image's own stream; its first draw is the start."""
        batch = len(self.samples)
        indices = list(self.batch_index) if self.batch_index is not None else batch
        return NoiseSource(self.seed, indices, tuple(self.samples.shape[1:]))


@dataclass(frozen=True)
class Sampled:
    """What a sampling run gave, and what it took.

    samples     (B, C, h, w) float32 on the CPU, in socket units
    seconds     for all steps, without loading
    peak_bytes  of the device's memory, or of the process where that is the CPU's
    device      its name
    """

    samples: Tensor
    seconds: float
    peak_bytes: int
    device: str


class Watch:
    """Times a sampling run and watches its memory: made where it begins, asked where it ends."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        self.start = time.perf_counter()

    def stop(self, samples: Tensor) -> Sampled:
        """The run's result with its figures."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
            name = f"{self.device} {torch.cuda.get_device_name(self.device)}"
        else:
            peak, name = process_peak(), str(self.device)
        return Sampled(samples, time.perf_counter() - self.start, peak, name)


def process_peak() -> int:
    """The most bytes that this process has held in main memory so far; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def mask_like(mask: Tensor, samples: Tensor) -> Tensor:
    """A noise mask of any size and batch as (B, 1, h, w), in [0, 1], for samples (B, C, h, w)."""
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).to(samples)
    mask = torch.nn.functional.interpolate(mask, size=samples.shape[-2:], mode="bilinear")
    repeats = -(-len(samples) // len(mask))
    return mask.repeat(repeats, 1, 1, 1)[: len(samples)]
