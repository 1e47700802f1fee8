"""The demo cascade as one object: prompts in, pictures out, on the public pieces of the core alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade_nodes.cascade_core import SemanticCompressor, StageA, StageB, StageC
from cascade_nodes.cascade_core.checkpoints import load_model
from cascade_nodes.cascade_core.guidance import Guider
from cascade_nodes.cascade_core.noise import NoiseSource
from cascade_nodes.cascade_core.samplers import sample
from cascade_nodes.cascade_core.text import TextEncoder
from cascade_nodes.demo.dataset import for_compressor
from cascade_nodes.demo.recipe import LATENT, STAGE_B_LATENT

WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Sampling:
    """How one stage is sampled."""

    steps: int
    cfg: float
    shift: float = 1.0
    cfg_rescale: float = 0.0
    sampler: str = "ddpm"


# The demo graph's own: gentler guidance in Stage C than the published 4 at shift 2, a little more in Stage B.
PRIOR = Sampling(steps=20, cfg=3.0, sampler="dpmpp_2m")
DECODER = Sampling(steps=10, cfg=1.4)


@dataclass
class DemoCascade:
    """All networks of the demo on one device, in float32."""

    text: TextEncoder
    stage_c: StageC
    stage_b: StageB
    stage_a: StageA
    compressor: SemanticCompressor
    device: torch.device

    @classmethod
    def load(cls, weights: Path = WEIGHTS, device: str | torch.device = "cpu") -> "DemoCascade":
        device = torch.device(device)
        text = TextEncoder.load(weights / "demo_text_encoder", dtype=torch.float32)
        text.model.to(device)
        networks: dict[str, Any] = {
            name: load_model(weights / f"demo_{name}.safetensors", name, torch.float32, device)[0]
            for name in ("stage_c", "stage_b", "stage_a", "compressor")
        }
        return cls(text=text, device=device, **networks)

    @torch.no_grad()
    def prior(self, prompts: Sequence[str], seed: int, how: Sampling = PRIOR, negative: str = "") -> Tensor:
        """Stage C's latents: (B, 16, 6, 6)"""
        count = len(prompts)
        noise = NoiseSource(seed, count, LATENT)
        no_image = torch.zeros(1, 1, self.stage_c.config.c_clip_img)
        sides = []
        for texts in (list(prompts), [negative]):
            states, pooled = self.text.encode(texts)
            sides.append({"clip_text": states, "clip_text_pooled": pooled[:, None], "clip_img": no_image})
        guider = Guider(self.stage_c, *sides, cfg=how.cfg, cfg_rescale=how.cfg_rescale)
        return self._sample(guider, noise, how)

    @torch.no_grad()
    def decode(self, latents: Tensor, prompts: Sequence[str], seed: int, how: Sampling = DECODER) -> Tensor:
        """Stage C's latents to pictures: (B, 3, 256, 256) in [0, 1]"""
        noise = NoiseSource(seed, len(latents), STAGE_B_LATENT)
        pooled, no_text = (self.text.encode(texts).pooled[:, None] for texts in (list(prompts), [""]))
        positive = {"effnet": latents, "clip": pooled}
        negative = {"effnet": torch.zeros_like(latents), "clip": no_text}
        guider = Guider(self.stage_b, positive, negative, cfg=how.cfg, cfg_rescale=how.cfg_rescale)
        return self.stage_a.decode(self._sample(guider, noise, how)).clamp(0, 1)

    def _sample(self, guider: Guider, noise: NoiseSource, how: Sampling) -> Tensor:
        start = noise.draw().to(self.device)
        return sample(
            guider, start, steps=how.steps, shift=how.shift, sampler=how.sampler,
            noise=lambda: noise.draw().to(self.device),
        )  # fmt: skip

    def pictures(
        self, prompts: Sequence[str], seed: int = 0, prior: Sampling = PRIOR, decoder: Sampling = DECODER,
        negative: str = "", batch: int = 50,
    ) -> Tensor:  # fmt: skip
        """One picture for each prompt, of seeds seed, seed + 1, …: (N, 3, 256, 256) in [0, 1] on the CPU"""
        done = []
        for start in range(0, len(prompts), batch):
            some = prompts[start : start + batch]
            latents = self.prior(some, seed + start, prior, negative)
            done.append(self.decode(latents, some, seed + start, decoder).cpu())
        return torch.cat(done)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, seed: int = 0, decoder: Sampling = DECODER) -> Tensor:
        """uint8 (B, 3, 256, 256) through compressor, Stage B and Stage A: float in [0, 1] on the CPU"""
        latents = self.compressor(for_compressor(images.to(self.device)))
        return self.decode(latents, [""] * len(images), seed, decoder).cpu()
