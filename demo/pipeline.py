"""The demo cascade as one object: prompts in, pictures out, on the public pieces of the core alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade_nodes.cascade_core import SemanticCompressor, StageA, StageB, StageC
from cascade_nodes.cascade_core.adapters import LearnedToken
from cascade_nodes.cascade_core.checkpoints import load_model
from cascade_nodes.cascade_core.diffusion.guidance import Guider
from cascade_nodes.cascade_core.geometry import (
    STAGE_B_COMPRESSION,
    compressor_size,
    stage_b_size,
    stage_c_size,
)
from cascade_nodes.cascade_core.networks.tiles import predict_in_tiles
from cascade_nodes.cascade_core.run import SamplingRun, by_log_snr, sample
from cascade_nodes.cascade_core.text.encoder import TextEncoder
from cascade_nodes.cascade_core.vision import ImageEncoder
from cascade_nodes.demo.dataset import as_float, for_compressor, resized
from cascade_nodes.demo.door import WEIGHTS
from cascade_nodes.demo.recipe import LATENT, PICTURE, STAGE_B_LATENT

Size = tuple[int, int]  # height and width in pixels
SIZE: Size = (PICTURE, PICTURE)
Control = Sequence[Tensor | None] | None


@dataclass(frozen=True)
class Sampling:
    """How one stage is sampled."""

    steps: int
    cfg: float
    shift: float = 1.0
    cfg_rescale: float = 0.0
    sampler: str = "ddpm"
    denoise: float = 1.0


# The demo graph's own: gentler guidance in Stage C than the published 4 at shift 2, a little more in Stage B.
PRIOR = Sampling(steps=20, cfg=3.0, sampler="dpmpp_2m")
DECODER = Sampling(steps=10, cfg=1.4)
SECOND_PASS = Sampling(
    steps=5, cfg=1.0, denoise=0.3
)  # Stage B at a larger size, from the first pass's picture


@dataclass
class DemoCascade:
    """All networks of the demo on one device, in float32."""

    text: TextEncoder
    stage_c: StageC
    stage_b: StageB
    stage_a: StageA
    compressor: SemanticCompressor
    device: torch.device
    vision: ImageEncoder | None = None  # loaded when a picture is first embedded
    weights: Path = WEIGHTS

    @classmethod
    def load(cls, weights: Path = WEIGHTS, device: str | torch.device = "cpu") -> "DemoCascade":
        device = torch.device(device)
        text = TextEncoder.load(weights / "demo_text_encoder", dtype=torch.float32)
        text.model.to(device)
        networks: dict[str, Any] = {
            name: load_model(weights / f"demo_{name}.safetensors", name, torch.float32, device)[0]
            for name in ("stage_c", "stage_b", "stage_a", "compressor")
        }
        return cls(text=text, device=device, weights=weights, **networks)

    def embed(self, images: Tensor) -> Tensor:
        """uint8 pictures (B, 3, H, W) as prompts: (B, E)"""
        if self.vision is None:
            self.vision = ImageEncoder.load(self.weights / "demo_image_encoder.safetensors", torch.float32)
            self.vision.model.to(self.device)
        return self.vision.encode(as_float(images).movedim(1, -1))

    @torch.no_grad()
    def compress(self, images: Tensor) -> Tensor:
        """uint8 pictures (B, 3, 256, 256) as Stage C's latents: (B, 16, 6, 6)"""
        return self.compressor(for_compressor(images.to(self.device)))

    @torch.no_grad()
    def prior(
        self, prompts: Sequence[str], seed: int, how: Sampling = PRIOR, negative: str = "", size: Size = SIZE,
        images: Tensor | None = None, start: Tensor | None = None, mask: Tensor | None = None,
        control: Control = None, learned: Sequence[LearnedToken] = (),
    ) -> Tensor:  # fmt: skip
        """Stage C's latents of pictures of that size: (B, 16, 6, 6) at 256×256

        images: pictures as prompts (B, n, E); start: latents to begin from, where `how.denoise` is below 1, or that
        stay outside `mask` (B, 1, h, w); control: a ControlNet's residuals, by Stage C's residual block;
        learned: tokens that a prompt may name.
        """
        empty = torch.zeros(len(prompts), LATENT[0], *stage_c_size(*size))
        no_image = torch.zeros(1, 1 if images is None else images.shape[1], self.stage_c.config.c_clip_img)
        sides = []
        for texts, shown in ((list(prompts), images), ([negative], None)):
            states, pooled = self.text.encode(texts, learned)
            embedded = no_image if shown is None else shown
            sides.append({"clip_text": states, "clip_text_pooled": pooled[:, None], "clip_img": embedded})
            if control is not None:
                sides[-1]["control"] = control
        guider = Guider(self.stage_c, *sides, cfg=how.cfg, cfg_rescale=how.cfg_rescale)
        return self._sample(guider, empty if start is None else start, seed, how, mask)

    @torch.no_grad()
    def decode(
        self, latents: Tensor, prompts: Sequence[str], seed: int, how: Sampling = DECODER, size: Size = SIZE,
        source: Tensor | None = None, tile: int = 0, mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Stage C's latents (B, 16, h, w) to pictures of that size: (B, 3, *size) in [0, 1]

        source: pictures of the same size to start from, where `how.denoise` is below 1, or that stay outside `mask`
        (B, 1, h / 4, w / 4); tile: pixels a side of Stage
        B's tiles, 0: whole.
        """
        pooled, no_text = (self.text.encode(texts).pooled[:, None] for texts in (list(prompts), [""]))
        positive = {"effnet": latents, "clip": pooled}
        negative = {"effnet": torch.zeros_like(latents), "clip": no_text}
        model = self._stage_b_in_tiles(tile // STAGE_B_COMPRESSION) if tile else self.stage_b
        guider = Guider(model, positive, negative, cfg=how.cfg, cfg_rescale=how.cfg_rescale)
        if source is None:
            start = torch.zeros(len(latents), STAGE_B_LATENT[0], *stage_b_size(*size))
        else:
            start = self.stage_a.encode(source.to(self.device))
        return self.stage_a.decode(self._sample(guider, start, seed, how, mask)).clamp(0, 1)

    def _stage_b_in_tiles(self, tile: int) -> Callable[..., Tensor]:
        def predict(x: Tensor, r: Tensor, effnet: Tensor, clip: Tensor) -> Tensor:
            return predict_in_tiles(
                lambda part, seen: self.stage_b(part, r, seen, clip),
                x,
                effnet,
                tile,
                self.stage_b.config.patch_size,
            )

        return predict

    def _sample(
        self, guider: Guider, latent: Tensor, seed: int, how: Sampling, mask: Tensor | None
    ) -> Tensor:
        """latent: (B, C, h, w) to start from, zeros for noise alone."""
        run = SamplingRun(latent.to(self.device), seed, how.steps, how.shift, how.sampler, how.denoise, mask)
        return sample(run, by_log_snr(guider))

    def pictures(
        self, prompts: Sequence[str], seed: int = 0, prior: Sampling = PRIOR, decoder: Sampling = DECODER,
        negative: str = "", batch: int = 50, size: Size = SIZE, learned: Sequence[LearnedToken] = (),
    ) -> Tensor:  # fmt: skip
        """One picture for each prompt, of seeds seed, seed + 1, …: (N, 3, *size) in [0, 1] on the CPU"""
        done = []
        for start in range(0, len(prompts), batch):
            some = prompts[start : start + batch]
            latents = self.prior(some, seed + start, prior, negative, size, learned=learned)
            done.append(self.decode(latents, some, seed + start, decoder, size).cpu())
        return torch.cat(done)

    @torch.no_grad()
    def enlarge(
        self, images: Tensor, prompts: Sequence[str], seed: int, factor: int = 2,
        how: Sampling = SECOND_PASS, tile: int = 0, batch: int = 8,
    ) -> Tensor:  # fmt: skip
        """A second pass: pictures (N, 3, H, W) made anew at `factor` times their size, (N, 3, …) in [0, 1] on the CPU

        Each is enlarged and read by the compressor at the new size; Stage B starts from it, partly noised.
        """
        size = factor * images.shape[-2], factor * images.shape[-1]
        done = []
        for start in range(0, len(images), batch):
            some = slice(start, start + batch)
            part = images[some].to(self.device)
            latents = self.compressor(resized(part, compressor_size(*size)))
            source = resized(part, size)
            done.append(self.decode(latents, prompts[some], seed + start, how, size, source, tile).cpu())
        return torch.cat(done)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, seed: int = 0, decoder: Sampling = DECODER) -> Tensor:
        """uint8 (B, 3, 256, 256) through compressor, Stage B and Stage A: float in [0, 1] on the CPU"""
        latents = self.compress(images)
        return self.decode(latents, [""] * len(images), seed, decoder).cpu()
