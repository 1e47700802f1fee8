"""The front door: a whole cascade as one object, prompts in and pictures out.

    cascade = StableCascade.load("models", memory="8GB")
    cascade.add_lora("my_style.safetensors", 0.8)
    picture = cascade("a lighthouse in a storm", negative="blurry", size=(1024, 1024), seed=7)[0]

Words and units are those of the nodes: a picture made here, by the nodes and by `cascade run` is the same to the byte.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
from torch import Tensor

from . import limits
from .adapters import check_finite_changes, check_fits, describe_notes, read_adapter
from .adapters.text_changes import check_text_changes
from .adapters.tokens import parse_new_tokens
from .arguments import (
    DECODER,
    PRIOR,
    SECOND_PASS,
    Output,
    Size,
    StageSettings,
    batch_size,
    check_latent_size,
    check_output,
    check_start,
    checked_controls,
    checked_flag,
    checked_image,
    checked_image_prompts,
    checked_mask,
    checked_prompts,
    checked_sampling,
    checked_settings,
    checked_size,
    checked_tile,
    chosen_settings,
    expanded,
)
from .errors import CascadeError, Interrupted, printable, quoted
from .geometry import largest_size, stage_c_size
from .hints.masks import composite
from .limits import real_number, whole_number
from .loaded import AppliedLoRA
from .making import EncodedPicture, PictureStages, ProgressCallback, owned
from .making import StageProgress as StageProgress
from .model_files import ModelFiles
from .pictures import Picture, as_image, to_pil
from .run import RunObserver
from .stages.device import ComputeDevice
from .stages.diffusion import checked_semantic
from .stages.hint import Control
from .stages.prompt import check_text

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)


class StableCascade(PictureStages):
    """A cascade whose networks are loaded as they are first needed.

    One call runs at a time; another thread's call waits. `close`, or leaving a `with` block, gives the memory back.
    """

    def __init__(
        self,
        files: ModelFiles,
        device: ComputeDevice,
        dtype: str = "auto",
        prior: StageSettings = PRIOR,
        decoder: StageSettings = DECODER,
        size: Size = (1024, 1024),
    ):
        super().__init__(files, device, dtype)
        self.prior_settings = checked_settings(prior, "prior")
        self.decoder_settings = checked_settings(decoder, "decoder")
        self.size = checked_size(size)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        dtype: str = "auto",
        device: str | torch.device = "auto",
        memory: int | str | None = None,
        prefer: str = "full",
        prior: StageSettings = PRIOR,
        decoder: StageSettings = DECODER,
        size: Size = (1024, 1024),
        **files: str | Path,
    ) -> Self:
        """A cascade from a folder: ComfyUI's `models`, any folder of safetensors files, or diffusers' folders.

        dtype    of Stage B and C: auto, bf16, fp16, fp32 or fp8
        device   auto, cpu, cuda or cuda:N
        memory   how much of a card's memory to take, in bytes or as "8GB"; None: the free memory
        prefer   "full": the largest of several networks for a stage is taken; "lite": the smallest
        files    a file by its role, as a path or a name inside the folder: stage_c, stage_b, stage_a, compressor,
                 previewer, text_encoder, vision
        prior, decoder, size  defaults for calls

        No network is loaded before it is needed. Raises CascadeError for a folder, device, dtype, memory or role that
        does not exist; for a missing file when it is needed.
        """
        observer = RunObserver(logger.warning, lambda: None)
        full_precision = dtype == "fp32"
        cascade = cls(
            ModelFiles(folder, files, prefer, full_precision),
            ComputeDevice(device, memory, observer),
            dtype,
            prior,
            decoder,
            size,
        )
        # Bound to the event, not to the cascade, so that a dropped cascade is freed at once, not when cycles are
        # collected.
        check = partial(_check_cancelled, cascade._cancelled)
        cascade.device.observer = replace(observer, check_interrupted=check)
        return cascade

    # Pictures

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative: str = "",
        size: Size | None = None,
        seed: int = 0,
        batch: int | None = None,
        steps: int | None = None,
        cfg: float | None = None,
        cfg_rescale: float | None = None,
        shift: float | None = None,
        sampler: str | None = None,
        decoder: StageSettings | None = None,
        image: Picture | None = None,
        denoise: float = 1.0,
        mask: Picture | None = None,
        room: tuple[int, int, int, int] | None = None,
        grow: int = 0,
        soft: bool = False,
        feather: int | None = None,
        image_prompts: Sequence[Picture | tuple[Picture, float]] = (),
        controls: Sequence[Control] = (),
        tile_size: int = 0,
        engine: bool = True,
        output: Output = "pil",
        callback: ProgressCallback | None = None,
    ) -> Any:  # list[Image], or Tensor with output="tensor"
        """Pictures of a prompt: a list of PIL images, or (B, H, W, 3) float32 in [0, 1] with output="tensor".

        prompt         one for all pictures, or a sequence, one for each
        size           (width, height) in pixels, multiples of 8; without it that of `image`, rounded down to such
                       multiples, else the cascade's own. A picture painted in a mask is returned at the image's size
        seed           of the first picture; picture i is drawn from seed + i
        batch          how many pictures; by default one, or as many as there are prompts or images
        steps … sampler  of Stage C; `decoder` holds Stage B's
        image          the picture to start from: a PIL image, a path, a tensor or array (B, H, W, 3) of floats in
                       [0, 1] or of uint8, or a list of these
        denoise        how much of it changes: 1 starts from noise alone
        mask           inpainting: white where the picture may change; the source is put back everywhere else
        room           outpainting: (left, top, right, bottom), pixels to add around `image`
        grow           Stage C positions by which its mask is wider; 1 with the inpainting ControlNet
        soft           keeps the mask's grey values, where the picture changes in part; otherwise a mask is yes or no
                       everywhere
        feather        pixels inside the mask over which the new part begins; by default 8, or 24 with `room`
        image_prompts  pictures beside the words, each with its strength (1 by default)
        controls       ControlNets with their pictures
        tile_size      side in pixels of Stage B's and Stage A's tiles, for large pictures; 0: whole
        engine         False: plain PyTorch
        callback       called with a StageProgress after each step; returning False cancels the run

        Raises CascadeError for arguments that do not fit, Interrupted where the run was cancelled.
        """
        with self._running():
            chosen = chosen_settings(self.prior_settings, steps, cfg, cfg_rescale, shift, sampler)
            sampling = checked_sampling(chosen, seed, engine, callback, denoise)
            decoder = self.decoder_settings if decoder is None else decoder
            decoding = checked_sampling(decoder, seed, engine, callback, owner="decoder")
            tile_size = checked_tile(tile_size)
            check_output(output)
            texts = checked_prompts(prompt, negative)
            source = checked_image(image)
            check_start(denoise, source)
            if room is not None:
                source, hole = expanded(source, mask, room)
            else:
                hole = checked_mask(mask, source)
            grow, soft = whole_number("grow", grow, limits.GROW), checked_flag("soft", soft)
            edge = (24 if room is not None else 8) if feather is None else feather
            edge = whole_number("feather", edge, limits.FEATHER)
            size = self._size(size, source)
            batch = batch_size(batch, size, prompts=texts[0], images=source, masks=hole)
            pictures, controls = checked_image_prompts(image_prompts), checked_controls(controls)
            self._check_files("text_encoder", "stage_c", "stage_b", "stage_a", controls=controls)
            self.stage("stage_b").check_picture_size(*size)  # before Stage C is sampled
            prompts = self._encode_text(*texts)
            latent = self._sample_prior(
                prompts, size, batch, sampling, source, None, hole, grow, soft, pictures, controls
            )
            start = None if hole is None else source
            decoded = self._sample_decoder(latent, prompts, size, decoding, start, hole, soft, tile_size)
            if hole is not None and source is not None:
                decoded = composite(decoded.movedim(-1, 1), source.movedim(-1, 1), hole, edge).movedim(1, -1)
            return _as_output(decoded, output)

    def prior(
        self,
        prompt: str | Sequence[str] = "",
        *,
        negative: str = "",
        size: Size | None = None,
        seed: int = 0,
        batch: int | None = None,
        steps: int | None = None,
        cfg: float | None = None,
        cfg_rescale: float | None = None,
        shift: float | None = None,
        sampler: str | None = None,
        image: Picture | None = None,
        latent: Tensor | None = None,
        denoise: float = 1.0,
        mask: Picture | None = None,
        grow: int = 0,
        soft: bool = False,
        image_prompts: Sequence[Picture | tuple[Picture, float]] = (),
        controls: Sequence[Control] = (),
        engine: bool = True,
        callback: ProgressCallback | None = None,
    ) -> Tensor:
        """Stage C alone: (B, 16, h, w) float32 on the CPU, h and w being ceil(pixels / 42.67).

        latent: a Stage C latent to start from, in place of `image`. All else as in a call.
        """
        with self._running():
            chosen = chosen_settings(self.prior_settings, steps, cfg, cfg_rescale, shift, sampler)
            sampling = checked_sampling(chosen, seed, engine, callback, denoise)
            texts = checked_prompts(prompt, negative)
            source = checked_image(image)
            semantic = None if latent is None else checked_semantic(latent)
            start = source if semantic is None else semantic
            check_start(denoise, start, "image or latent")
            hole = checked_mask(mask, start)
            grow, soft = whole_number("grow", grow, limits.GROW), checked_flag("soft", soft)
            if size is not None and semantic is not None:
                check_latent_size(semantic, checked_size(size))
            size = self._size(size, source, semantic)
            batch = batch_size(batch, size, prompts=texts[0], images=start, masks=hole)
            pictures, controls = checked_image_prompts(image_prompts), checked_controls(controls)
            self._check_files("text_encoder", "stage_c", controls=controls)
            prompts = self._encode_text(*texts)
            return owned(
                self._sample_prior(
                    prompts, size, batch, sampling, source, semantic, hole, grow, soft, pictures, controls
                )
            )

    def decode(
        self,
        latent: Tensor,
        prompt: str | Sequence[str] = "",
        *,
        negative: str = "",
        size: Size | None = None,
        seed: int = 0,
        steps: int | None = None,
        cfg: float | None = None,
        cfg_rescale: float | None = None,
        shift: float | None = None,
        sampler: str | None = None,
        image: Picture | None = None,
        denoise: float = 1.0,
        mask: Picture | None = None,
        soft: bool = False,
        tile_size: int = 0,
        engine: bool = True,
        output: Output = "pil",
        callback: ProgressCallback | None = None,
    ) -> Any:  # list[Image], or Tensor with output="tensor"
        """Stage B and Stage A: Stage C's latent (B, 16, h, w) to pictures.

        steps … sampler  of Stage B
        size             without it that of `image`, else one of the latent's own proportions
        image            the picture that Stage B starts from where denoise is below 1, or that stays outside `mask`

        All else as in a call.
        """
        with self._running():
            chosen = chosen_settings(self.decoder_settings, steps, cfg, cfg_rescale, shift, sampler)
            decoding = checked_sampling(chosen, seed, engine, callback, denoise)
            tile_size = checked_tile(tile_size)
            check_output(output)
            texts = checked_prompts(prompt, negative)
            semantic = checked_semantic(latent)
            source = checked_image(image)
            check_start(denoise, source)
            hole = checked_mask(mask, source)
            size = self._size(size, source, semantic)
            batch_size(len(semantic), size, prompts=texts[0], images=source, masks=hole)
            self._check_files("text_encoder", "stage_b", "stage_a")
            prompts = self._encode_text(*texts)
            soft = checked_flag("soft", soft)
            decoded = self._sample_decoder(semantic, prompts, size, decoding, source, hole, soft, tile_size)
            return _as_output(decoded, output)

    def encode(
        self, image: Picture, *, size: Size | None = None, stage_a: bool = False, tile_size: int = 0
    ) -> EncodedPicture:
        """A picture's latents: Stage C's by the semantic compressor, and with `stage_a` Stage B's.

        size: (width, height) to which the picture is resized first.
        """
        with self._running():
            tile_size = checked_tile(tile_size)
            with_stage_a = checked_flag("stage_a", stage_a)
            source = as_image(image, "image")
            size = self._size(size, source)
            batch_size(None, size, images=source)
            self._check_files("compressor", *(["stage_a"] if with_stage_a else []))
            encoded = self._encode_picture(source, size, with_stage_a, tile_size)
            return EncodedPicture(*map(owned, encoded))

    def second_pass(
        self,
        image: Picture,
        prompt: str | Sequence[str] = "",
        *,
        negative: str = "",
        size: Size | None = None,
        seed: int = 0,
        denoise: float = 0.3,
        settings: StageSettings = SECOND_PASS,
        tile_size: int = 0,
        engine: bool = True,
        output: Output = "pil",
        callback: ProgressCallback | None = None,
    ) -> Any:  # list[Image], or Tensor with output="tensor"
        """Pictures made anew at a larger size, by default twice theirs: Stage B starts from the enlarged picture."""
        with self._running():
            decoding = checked_sampling(settings, seed, engine, callback, denoise, "settings")
            tile_size = checked_tile(tile_size)
            check_output(output)
            texts = checked_prompts(prompt, negative)
            source = as_image(image, "image")
            height, width = source.shape[1:3]
            size = (2 * width, 2 * height) if size is None else checked_size(size)
            batch_size(len(source), size, prompts=texts[0])
            self._check_files("text_encoder", "compressor", "stage_b", "stage_a")
            self.stage("stage_b").check_picture_size(*size)
            encoded = self._encode_picture(source, size, False, tile_size)
            prompts = self._encode_text(*texts)
            decoded = self._sample_decoder(
                encoded.stage_c, prompts, size, decoding, source, None, False, tile_size
            )
            return _as_output(decoded, output)

    # LoRAs and learned tokens

    def add_lora(
        self,
        file: str | Path,
        strength: float = 1.0,
        text_strength: float | None = None,
        new_tokens: str = "",
        alpha: float = 0.0,
        module_filters: str = "",
    ) -> str:
        """Applies a LoRA of any dialect, or a learned token, from now on; returns the name to remove it by.

        file           a path, or a name in the folder's `loras`
        strength       of its changes of Stage C: 0 not at all, 1 as trained
        text_strength  of its changes of the text encoder, including tokens; by default the same
        new_tokens     names for the tokens of official LoRAs, which do not hold them: `[fernando] ^dog</w>; …`
        alpha          the alpha that it was trained with, for files that do not state it; 0: as stated, or else its
                       rank
        module_filters  of an official LoRA's training, where its shapes fit several: `.attn, kv_mapper`

        A token that the file teaches is written as [name] in prompts. Raises CascadeError for a file that does not fit.
        """
        with self._running():
            text_strength = strength if text_strength is None else text_strength
            strength = real_number("strength", strength, limits.STRENGTH)
            text_strength = real_number("text_strength", text_strength, limits.STRENGTH)
            alpha = real_number("alpha", alpha, limits.ALPHA)
            check_text("new_tokens", new_tokens)
            check_text("module_filters", module_filters)
            path = self.files.named("lora", file)
            adapter = read_adapter(path, self.stage("stage_c").network.config, alpha, module_filters)
            named = tuple(parse_new_tokens(new_tokens))
            kind = "stage_b" if adapter.stage_b else "stage_c"
            if strength:
                check_fits(adapter, self.stage(kind).network.config, kind)
                check_finite_changes(adapter.diffusion, adapter.name)
            notes = describe_notes(adapter)
            if text_strength and (adapter.text or adapter.tokens):
                notes += check_text_changes(adapter, self.text_stage().encoder.model, named)
                # Refuses tokens that do not fit.
                self.text_stage().with_adapter(adapter, text_strength, named)
            for note in notes:
                logger.info(note)
            name = _free_name(path.name, self._loras)
            self._loras[name] = AppliedLoRA(adapter, strength, text_strength, named)
            return name

    def remove_lora(self, name: str) -> None:
        """Removes a LoRA or learned token. Raises CascadeError for one that is not there."""
        with self._running():
            if not isinstance(name, str) or name not in self._loras:
                applied = ", ".join(self._loras) or "none is"
                raise CascadeError(
                    f"No LoRA {quoted(name)} is applied ({printable(applied)}); give the name that add_lora gave."
                )
            del self._loras[name]

    @property
    def loras(self) -> tuple[str, ...]:
        """The names of the LoRAs and learned tokens that are applied."""
        return tuple(self._loras)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise CascadeError(
            "A StableCascade cannot be copied or sent to another process; call StableCascade.load there."
        )

    def _size(self, size: Size | None, source: Tensor | None, latent: Tensor | None = None) -> Size:
        """The given size, else the picture's, else the cascade's own if the latent fits it, else the latent's."""
        if size is not None:
            return checked_size(size)
        if source is not None:
            return source.shape[2], source.shape[1]
        width, height = self.size
        if latent is None or tuple(latent.shape[-2:]) == stage_c_size(height, width):
            return self.size
        height, width = largest_size(latent.shape[-2:])
        return width, height


def _check_cancelled(cancelled: threading.Event) -> None:
    if cancelled.is_set():
        raise Interrupted("The run was cancelled.")


def _as_output(pictures: Tensor, output: Output) -> list[Image] | Tensor:
    return owned(pictures) if output == "tensor" else to_pil(pictures)


def _free_name(name: str, taken: Mapping[str, object]) -> str:
    """The name, with a number appended where it is taken."""
    number = 2
    free = name
    while free in taken:
        free = f"{name} ({number})"
        number += 1
    return free
