"""The stages of a picture: prompts and pictures encoded, latents sampled, pixels decoded, each step reported."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .adapters import LearnedToken
from .adapters.embeddings import embedding_tokens
from .arguments import Sampling, Size
from .diffusion.samplers import Callback, SamplerStep
from .errors import CascadeError, Interrupted
from .geometry import LATENT_CHANNELS, compressor_size, stage_b_size, stage_c_size, whole_size
from .hints.masks import latent_mask
from .loaded import LoadedNetworks
from .pictures import resized, to_pil
from .run import SamplingRun
from .stages.control import AppliedControlNet
from .stages.diffusion import (
    SCALE_FACTOR,
    DiffusionStage,
    Guidance,
    check_channels,
    check_widths,
    stage_b_tile,
)
from .stages.hint import Control, make_hint
from .stages.prompt import PicturePrompt, Prompt
from .stages.weights import check_stage_finite

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageProgress:
    """A finished step of one stage.

    stage   stage_c or stage_b
    step    1 … steps
    latent  (B, C, h, w), the clean latent that this step predicted, in the network's units
    """

    stage: str
    step: int
    steps: int
    latent: Tensor
    _preview: Callable[[Tensor], Image | None]

    def preview(self) -> Image | None:
        """The first picture so far, by the previewer or by Stage A; None where the previewer's file is missing."""
        return self._preview(self.latent)


ProgressCallback = Callable[[StageProgress], object]


class EncodedPicture(NamedTuple):
    """stage_c: (B, 16, h, w); stage_b: (B, 4, H / 4, W / 4), zeros where Stage A was not asked for"""

    stage_c: Tensor
    stage_b: Tensor


class PictureStages(LoadedNetworks):
    """The stages of a picture, on arguments that were checked."""

    def _encode_text(self, prompts: list[str], negative: str) -> tuple[Prompt, Prompt]:
        text = self._text_with_loras()
        positive, other = text.encode_each([prompts, [negative]], self._embeddings)
        for name, encoded in (("prompt", positive), ("negative", other)):
            result = [encoded.states, encoded.pooled]
            check_stage_finite(
                result, text, f"What the text encoder gives for {name}", "lower the weights in the prompt"
            )
        return positive, other

    def _embeddings(self, prompt: str, width: int) -> list[LearnedToken]:
        """The tokens of files that a prompt asks for by `embedding:name`."""
        return embedding_tokens(prompt, width, self.files.embedding, str(self.files.folder / "embeddings"))

    def _encode_picture(self, source: Tensor, size: Size, stage_a: bool, tile_size: int) -> EncodedPicture:
        width, height = size
        compressor = self.compressor()
        stage_c = compressor.encode(resized(source, compressor_size(height, width)))
        check_stage_finite([stage_c], compressor, "The compressor's latent")
        whole = whole_size(height, width)
        if not stage_a:
            return EncodedPicture(stage_c, self._empty("stage_b", len(source), whole))
        codec = self.stage_a()
        stage_b = codec.encode(resized(source, whole), tile_size)
        check_stage_finite([stage_b], codec, "Stage A's latent")
        return EncodedPicture(stage_c, stage_b)

    @staticmethod
    def _empty(kind: str, batch: int, size: tuple[int, int]) -> Tensor:
        positions = stage_c_size(*size) if kind == "stage_c" else stage_b_size(*size)
        return torch.zeros(batch, LATENT_CHANNELS[kind], *positions)

    def _sample_prior(
        self,
        prompts: tuple[Prompt, Prompt],
        size: Size,
        batch: int,
        sampling: Sampling,
        source: Tensor | None,
        latent: Tensor | None,
        mask: Tensor | None,
        grow: int,
        soft: bool,
        pictures: Sequence[tuple[Tensor, float]],
        controls: Sequence[Control],
    ) -> Tensor:
        width, height = size
        stage = self._with_loras("stage_c")
        check_widths(prompts[0], stage)
        if latent is not None:
            check_channels(latent, stage)
        if latent is None and source is not None and (sampling.denoise < 1 or mask is not None):
            latent = self._encode_picture(source, size, False, 0).stage_c
        if latent is None:
            latent = self._empty("stage_c", batch, (height, width))
        latent = _repeated(latent, batch)
        if sampling.denoise == 0:
            return latent
        noise_mask = None if mask is None else latent_mask(mask, batch, latent.shape[-2:], grow, soft)
        positive, negative = prompts
        positive = replace(positive, pictures=self._picture_prompts(pictures))
        applied = tuple(
            self._applied(control, size, source, mask) for control in controls if control.strength
        )
        positive, negative = (replace(prompt, controlnets=applied) for prompt in (positive, negative))
        return self._sample(stage, sampling, latent, noise_mask, positive, negative)

    def _sample_decoder(
        self,
        semantic: Tensor,
        prompts: tuple[Prompt, Prompt],
        size: Size,
        sampling: Sampling,
        source: Tensor | None,
        mask: Tensor | None,
        soft: bool,
        tile_size: int,
    ) -> Tensor:
        width, height = size
        stage, codec = self._with_loras("stage_b"), self.stage_a()
        check_channels(semantic, stage)
        stage.check_picture_size(width, height)
        batch = len(semantic)
        latent = self._empty("stage_b", batch, whole_size(height, width))
        if source is not None and (sampling.denoise < 1 or mask is not None):
            encoded = codec.encode(resized(source, whole_size(height, width)), tile_size)
            check_stage_finite([encoded], codec, "Stage A's latent")
            latent = _repeated(encoded, batch)
        noise_mask = None if mask is None else latent_mask(mask, batch, latent.shape[-2:], soft=soft)
        if sampling.denoise:
            positive, negative = prompts
            positive = replace(positive, effnet=semantic)
            negative = replace(negative, effnet=torch.zeros_like(semantic))
            tile = stage_b_tile(tile_size)
            latent = self._sample(stage, sampling, latent, noise_mask, positive, negative, tile)
        self.device.observer.check_interrupted()
        pictures = codec.decode(latent, tile_size)
        check_stage_finite([pictures], codec, "The decoded picture")
        return pictures

    def _sample(
        self,
        stage: DiffusionStage,
        sampling: Sampling,
        latent: Tensor,
        mask: Tensor | None,
        positive: Prompt,
        negative: Prompt,
        tile_positions: int = 0,
    ) -> Tensor:
        settings = sampling.settings
        run = SamplingRun(
            latent, sampling.seed, settings.steps, settings.shift, settings.sampler, sampling.denoise, mask
        )
        guidance = Guidance(settings.cfg, settings.cfg_rescale)
        steps = self._callback(stage.kind, sampling.callback)
        result = stage.sample(run, positive, negative, guidance, tile_positions, sampling.engine, steps)
        advice = "lower cfg and the weights in the prompt, or choose dtype bf16 or fp32"
        check_stage_finite([result.latent], stage, f"The latent that {stage.described} sampled", advice)
        logger.debug("%s: %.2f s, %d bytes", stage.described, result.seconds, result.peak_bytes)
        return result.latent

    def _callback(self, kind: str, callback: ProgressCallback | None) -> Callback | None:
        if callback is None:
            return None

        def report(step: SamplerStep) -> None:
            preview = self._preview_prior if kind == "stage_c" else self._preview_decoder
            # The callback gets a copy of x0, which the sampler may read again, and runs outside of inference mode.
            progress = StageProgress(kind, step.index + 1, step.steps, owned(step.x0), preview)
            with torch.inference_mode(False), torch.no_grad():
                cancelled = callback(progress) is False
            if cancelled:
                raise Interrupted("The run was cancelled.")

        return report

    def _preview_prior(self, latent: Tensor) -> Image | None:
        with self._running():
            if any(self.files.find_optional(role) is None for role in ("compressor", "previewer")):
                return None
            return to_pil(self.compressor().decode(latent[:1].cpu()))[0]

    def _preview_decoder(self, latent: Tensor) -> Image | None:
        with self._running():
            return to_pil(self.stage_a().decode(latent[:1].cpu() * SCALE_FACTOR))[0]

    def _picture_prompts(self, pictures: Sequence[tuple[Tensor, float]]) -> tuple[PicturePrompt, ...]:
        prompts = []
        for picture, strength in pictures:
            if strength == 0:
                continue
            vision = self.vision_stage()
            embeds = vision.encode(picture)
            check_stage_finite([embeds], vision, "What the image encoder gives")
            prompts.append(PicturePrompt(embeds, strength))
        return tuple(prompts)

    def _applied(
        self, control: Control, size: Size, source: Tensor | None, mask: Tensor | None
    ) -> AppliedControlNet:
        stage = self.controlnet(control.file)
        hint = make_hint(control, stage, size, source, mask, self.compressor)
        return AppliedControlNet(stage, hint, control.strength, control.start, control.end)


def _repeated(latent: Tensor, batch: int) -> Tensor:
    """A latent for each image of the batch."""
    if len(latent) not in (1, batch):
        raise CascadeError(
            f"{len(latent)} latents were given for a batch of {batch}; give one, or one for each."
        )
    return latent if len(latent) == batch else latent.repeat(batch, 1, 1, 1)


def owned(tensor: Tensor) -> Tensor:
    """A copy that the caller may change in place, which PyTorch refuses for a tensor made in inference mode."""
    with torch.inference_mode(False):
        return tensor.detach().clone()
