"""The demo cascade for its evaluation: many prompts at once through the stages of the front door."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade_nodes.cascade_core.adapters import LearnedToken
from cascade_nodes.cascade_core.adapters.apply import Patch
from cascade_nodes.cascade_core.geometry import compressor_size, stage_b_size, stage_c_size
from cascade_nodes.cascade_core.run import SamplingRun
from cascade_nodes.cascade_core.stages.control import AppliedControlNet
from cascade_nodes.cascade_core.stages.diffusion import DiffusionStage, Guidance, stage_b_tile
from cascade_nodes.cascade_core.stages.prompt import PicturePrompt, Prompt
from cascade_nodes.cascade_core.text.encoder import TextEncoder
from cascade_nodes.demo.dataset import as_float, for_compressor, resized
from cascade_nodes.demo.door import WEIGHTS, StableCascade
from cascade_nodes.demo.recipe import LATENT, PICTURE, STAGE_B_LATENT

Size = tuple[int, int]  # height and width in pixels
SIZE: Size = (PICTURE, PICTURE)


@dataclass(frozen=True)
class Sampling:
    """Settings that one stage is sampled with."""

    steps: int
    cfg: float
    shift: float = 1.0
    cfg_rescale: float = 0.0
    sampler: str = "ddpm"
    denoise: float = 1.0


# The demo graph's settings: weaker guidance in Stage C than the published 4 at shift 2, slightly stronger in Stage B.
PRIOR = Sampling(steps=20, cfg=3.0, sampler="dpmpp_2m")
DECODER = Sampling(steps=10, cfg=1.4)
# Stage B at a larger size, starting from the first pass's picture.
SECOND_PASS = Sampling(steps=5, cfg=1.0, denoise=0.3)


class DemoCascade:
    """The demo's networks behind the front door, for many pictures at once: a prompt for each, latents in between."""

    def __init__(self, cascade: StableCascade):
        self.cascade = cascade
        self.device = cascade.device.device
        self.weights = cascade.files.folder
        self.patches: tuple[Patch, ...] = ()

    @classmethod
    def load(cls, weights: Path = WEIGHTS, device: str | torch.device = "cpu") -> "DemoCascade":
        return cls(StableCascade.load(weights, device=device, dtype="fp32"))

    @property
    def batch(self) -> int:
        """Pictures made at once, enough to keep the device busy. The noise of a picture does not depend on it."""
        return 125 if self.device.type == "cuda" else 50

    @property
    def stage_c(self) -> Any:
        """Stage C's network, as loaded."""
        return self.cascade.stage("stage_c").network

    @property
    def text(self) -> TextEncoder:
        """The text encoder with its tokenizer."""
        return self.cascade.text_stage().encoder

    @contextmanager
    def patched(self, patches: Sequence[Patch]) -> Iterator[None]:
        """Applies patches to Stage C inside the block."""
        self.patches = tuple(patches)
        try:
            yield
        finally:
            self.patches = ()

    def embed(self, images: Tensor) -> Tensor:
        """uint8 pictures (B, 3, H, W) as prompts: (B, E)"""
        return self.cascade.vision_stage().encode(as_float(images).movedim(1, -1))

    def compress(self, images: Tensor) -> Tensor:
        """uint8 pictures (B, 3, 256, 256) as Stage C's latents: (B, 16, 6, 6)"""
        return self.compressor(for_compressor(images))

    def compressor(self, pixels: Tensor) -> Tensor:
        """(B, 3, 32 · h, 32 · w) in [0, 1] as Stage C's latents: (B, 16, h, w)"""
        return self.cascade.compressor().encode(pixels.movedim(1, -1))

    def prior(
        self, prompts: Sequence[str], seed: int, how: Sampling = PRIOR, negative: str = "", size: Size = SIZE,
        images: Tensor | None = None, start: Tensor | None = None, mask: Tensor | None = None,
        controls: Sequence[AppliedControlNet] = (), learned: Sequence[LearnedToken] = (),
    ) -> Tensor:  # fmt: skip
        """Stage C's latents of pictures of that size: (B, 16, 6, 6) at 256×256

        images: pictures as prompts (B, n, E); start: latents to begin from, where `how.denoise` is below 1, or that
        stay outside `mask` (B, 1, h, w); learned: tokens that a prompt may name.
        """
        stage, text = self.cascade.stage("stage_c"), self.cascade.text_stage()
        text = replace(text, learned=tuple(learned))
        empty = torch.zeros(len(prompts), LATENT[0], *stage_c_size(*size))
        no_image = torch.zeros(1, 1 if images is None else images.shape[1], stage.network.config.c_clip_img)
        sides = [
            replace(text.encode(texts), pictures=(PicturePrompt(embeds),), controlnets=tuple(controls))
            for texts, embeds in ((prompts, no_image if images is None else images), ([negative], no_image))
        ]
        return self._sample(
            replace(stage, patches=self.patches), empty if start is None else start, seed, how, mask, sides
        )

    def decode(
        self, latents: Tensor, prompts: Sequence[str], seed: int, how: Sampling = DECODER, size: Size = SIZE,
        source: Tensor | None = None, tile_pixels: int = 0, mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Stage C's latents (B, 16, h, w) to pictures of that size: (B, 3, *size) in [0, 1] on the CPU

        source: pictures of the same size to start from, where `how.denoise` is below 1, or that stay outside `mask`
        (B, 1, h / 4, w / 4); tile_pixels: side of Stage B's tiles, 0: whole.
        """
        stage, codec, text = self.cascade.stage("stage_b"), self.cascade.stage_a(), self.cascade.text_stage()
        if source is None:
            start = torch.zeros(len(latents), STAGE_B_LATENT[0], *stage_b_size(*size))
        else:
            start = codec.encode(source.movedim(1, -1))
        sides = [
            replace(text.encode(prompts), effnet=latents),
            replace(text.encode([""]), effnet=torch.zeros_like(latents)),
        ]
        sampled = self._sample(stage, start, seed, how, mask, sides, stage_b_tile(tile_pixels))
        return codec.decode(sampled).movedim(-1, 1)

    @staticmethod
    def _sample(
        stage: DiffusionStage, latent: Tensor, seed: int, how: Sampling, mask: Tensor | None,
        sides: Sequence[Prompt], tile_positions: int = 0,
    ) -> Tensor:  # fmt: skip
        """latent: (B, C, h, w) to start from, zeros for noise alone; sides: the positive and the negative prompt."""
        run = SamplingRun(latent, seed, how.steps, how.shift, how.sampler, how.denoise, mask)
        guidance = Guidance(how.cfg, how.cfg_rescale)
        positive, negative = sides
        sampled = stage.sample(run, positive, negative, guidance, tile_positions)
        return sampled.latent.clone()  # usable outside inference mode

    def pictures(
        self, prompts: Sequence[str], seed: int = 0, prior: Sampling = PRIOR, decoder: Sampling = DECODER,
        negative: str = "", batch: int | None = None, size: Size = SIZE, learned: Sequence[LearnedToken] = (),
    ) -> Tensor:  # fmt: skip
        """One picture for each prompt, with seeds seed, seed + 1, …: (N, 3, *size) in [0, 1] on the CPU"""
        done = []
        batch = batch or self.batch
        for start in range(0, len(prompts), batch):
            some = prompts[start : start + batch]
            latents = self.prior(some, seed + start, prior, negative, size, learned=learned)
            done.append(self.decode(latents, some, seed + start, decoder, size))
        return torch.cat(done)

    def enlarge(
        self, images: Tensor, prompts: Sequence[str], seed: int, factor: int = 2,
        how: Sampling = SECOND_PASS, tile_pixels: int = 0, batch: int = 8,
    ) -> Tensor:  # fmt: skip
        """A second pass: pictures (N, 3, H, W) made anew at `factor` times their size, (N, 3, …) in [0, 1] on the CPU

        Each is enlarged and read by the compressor at the new size; Stage B starts from it, partly noised.
        """
        size = factor * images.shape[-2], factor * images.shape[-1]
        done = []
        for start in range(0, len(images), batch):
            some = slice(start, start + batch)
            part = images[some]
            latents = self.compressor(resized(part, compressor_size(*size)))
            source = resized(part, size)
            done.append(self.decode(latents, prompts[some], seed + start, how, size, source, tile_pixels))
        return torch.cat(done)

    def reconstruct(self, images: Tensor, seed: int = 0, decoder: Sampling = DECODER) -> Tensor:
        """uint8 (B, 3, 256, 256) through compressor, Stage B and Stage A: float in [0, 1] on the CPU"""
        latents = self.compress(images)
        return self.decode(latents, [""] * len(images), seed, decoder)
