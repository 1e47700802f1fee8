"""Makes a picture by any program's networks with this project's guidance and samplers, in the same loop for all."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cascade_nodes.cascade_core.diffusion.guidance import Guider
from cascade_nodes.cascade_core.run import SamplingRun, by_log_snr, sample
from networks import Setup, conditions, latent_shape, random_prompts
from timing import seconds


@dataclass(frozen=True)
class Program:
    """Name, both diffusion networks as callables, and Stage A's decoding of Stage B's latents."""

    name: str
    stage_c: Callable[..., Tensor]
    stage_b: Callable[..., Tensor]
    decode: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sampling:
    """Program with its own sampling loop: `run(batch)` makes that many pictures."""

    name: str
    run: Callable[[int], Any]


class BenchmarkPicture:
    """Fixed prompts and noise seed, so that every program makes the same picture."""

    def __init__(self, setup: Setup, side: int | None = None, batch: int = 1):
        self.setup, self.side, self.batch = setup, side or setup.side, batch
        self.prompts = random_prompts(setup)

    def prior(self, stage_c: Callable[..., Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """Stage C's latents (B, 16, h, w) in float32."""
        return self._sample("stage_c", stage_c, dtype)

    def decoder(
        self, stage_b: Callable[..., Tensor], prior: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Stage B's latents (B, 4, H / 4, W / 4) in float32."""
        return self._sample("stage_b", stage_b, dtype, prior)

    def pixels(self, decode: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
        """Pixels (B, 3, H, W), uint8 in main memory."""
        return decode(latents.to(self.setup.dtype)).clamp(0, 1).mul(255).round().to(torch.uint8).cpu()

    def make(self, program: Program) -> Tensor:
        """Pixels by all three stages."""
        prior = self.prior(program.stage_c)
        return self.pixels(program.decode, self.decoder(program.stage_b, prior))

    def time(self, program: Program) -> dict[str, float]:
        """Seconds of each stage and of the whole, each until the device has finished."""
        latents: dict[str, Tensor] = {}

        def stage_c() -> None:
            latents["prior"] = self.prior(program.stage_c)

        def stage_b() -> None:
            latents["latents"] = self.decoder(program.stage_b, latents["prior"])

        device = self.setup.device
        return {
            "whole": seconds(lambda: self.make(program), device),
            "stage_c": seconds(stage_c, device),
            "stage_b": seconds(stage_b, device),
            "stage_a": seconds(lambda: self.pixels(program.decode, latents["latents"]), device),
        }

    def _sample(
        self, kind: str, model: Callable[..., Tensor], dtype: torch.dtype | None, prior: Tensor | None = None
    ) -> Tensor:
        setup, i = self.setup, 0 if kind == "stage_c" else 1
        sides = []
        for prompt, latents in zip(
            self.prompts, (prior, None if prior is None else torch.zeros_like(prior)), strict=True
        ):
            sides.append(conditions(kind, prompt, latents))
        guider = Guider(model, *sides, cfg=setup.cfg[i], dtype=dtype or setup.dtype)
        latent = torch.zeros(self.batch, *latent_shape(kind, self.side), device=setup.device)
        run = SamplingRun(latent, steps=setup.steps[i], shift=setup.shift[i])
        return sample(run, by_log_snr(guider))
