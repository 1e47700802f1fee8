"""The front door: a whole cascade as one object, prompts in and pictures out.

    cascade = StableCascade.load("models", memory="8GB")
    cascade.add_lora("my_style.safetensors", 0.8)
    picture = cascade("a lighthouse in a storm", negative="blurry", size=(1024, 1024), seed=7)[0]

Words and units are those of the nodes: a picture made here, by the nodes and by `cascade run` is the same to the byte.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Self, TypeVar

import torch
from torch import Tensor

from . import limits
from .adapters import (
    Adapter,
    LearnedToken,
    check_finite_changes,
    check_fits,
    describe_notes,
    read_adapter,
)
from .adapters.apply import Patch
from .adapters.embeddings import embedding_tokens
from .adapters.text_changes import check_text_changes
from .adapters.tokens import NewToken, parse_new_tokens
from .arguments import (
    DECODER,
    PRIOR,
    SECOND_PASS,
    Output,
    Sampling,
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
from .diffusion.samplers import Callback, SamplerStep
from .errors import CascadeError, Interrupted, printable, quoted
from .geometry import (
    LATENT_CHANNELS,
    compressor_size,
    largest_size,
    stage_b_size,
    stage_c_size,
    whole_size,
)
from .hints.masks import composite, latent_mask
from .limits import real_number, whole_number
from .model_files import ModelFiles
from .pictures import Picture, as_image, resized, to_pil
from .run import Observer, SamplingRun
from .stages.codec import Codec, load_compressor, load_stage_a
from .stages.control import AppliedControlNet, ControlNetStage, load_controlnet
from .stages.device import ComputeDevice
from .stages.diffusion import (
    SCALE_FACTOR,
    DiffusionStage,
    Guidance,
    check_channels,
    check_widths,
    checked_semantic,
    load_stage,
    stage_b_tile,
)
from .stages.hint import Control, make_hint
from .stages.prompt import (
    PicturePrompt,
    Prompt,
    TextStage,
    VisionStage,
    check_text,
    load_image_encoder,
    load_text_encoder,
)
from .stages.weights import check_stage_finite

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)
T = TypeVar("T")
KINDS = ["stage_c", "stage_b"]
CLOSED = "This StableCascade was closed; load it again."


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


@dataclass(frozen=True)
class _AppliedLoRA:
    adapter: Adapter
    strength: float
    text_strength: float
    new_tokens: tuple[NewToken, ...]


class StableCascade:
    """A cascade's networks, loaded as they are first needed.

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
        device.weight_dtype(dtype)  # refuses an unknown dtype before a file is read
        self.files, self.device, self.dtype = files, device, dtype
        self.prior_settings = checked_settings(prior, "prior")
        self.decoder_settings = checked_settings(decoder, "decoder")
        self.size = checked_size(size)
        self._loaded: dict[tuple[str, Path], Any] = {}
        self._loras: dict[str, _AppliedLoRA] = {}
        self._lock = threading.RLock()
        self._depth = 0  # depth of nested calls, made by callbacks
        self._cancelled = threading.Event()
        self._closed = False

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
        observer = Observer(logger.warning, lambda: None)
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
            return _owned(
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
            return EncodedPicture(*map(_owned, encoded))

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
            self._loras[name] = _AppliedLoRA(adapter, strength, text_strength, named)
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

    # Lifetime

    def cancel(self) -> None:
        """Ends the call that is running in another thread, which raises Interrupted there."""
        self._cancelled.set()

    def close(self) -> None:
        """Gives the memory back. The object cannot be used any more."""
        with self._lock:
            self._loaded.clear()
            self._loras.clear()
            self.device.close()
            self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise CascadeError(
            "A StableCascade cannot be copied or sent to another process; call StableCascade.load there."
        )

    @contextmanager
    def _running(self) -> Iterator[None]:
        """One call at a time."""
        with self._lock:
            if self._closed:
                raise CascadeError(CLOSED)
            if not self._depth:  # a call within a callback must not reset the outer one's cancellation
                self._cancelled.clear()
            # The caller's autocast and default device are meant for the caller's own networks.
            elsewhere = torch.get_default_device().type != "cpu"
            default_device = torch.device("cpu") if elsewhere else nullcontext()
            with (
                torch.inference_mode(),
                torch.autocast(self.device.device.type, enabled=False),
                default_device,
            ):
                self._depth += 1
                try:
                    yield
                finally:
                    self._depth -= 1

    # Networks, loaded when they are first needed

    def _load(self, role: str, path: Path, load: Callable[[Path], T]) -> T:
        if self._closed:  # closed by a callback, or before a late preview
            raise CascadeError(CLOSED)
        if (role, path) not in self._loaded:
            self._loaded[role, path] = load(path)
        return self._loaded[role, path]

    def stage(self, kind: str) -> DiffusionStage:
        """Stage C or Stage B (kind stage_c, stage_b) as loaded, without changes by LoRAs."""
        if kind not in KINDS:
            raise CascadeError(f"kind is {quoted(kind)}; choose {' or '.join(KINDS)}.")
        path = self.files.find(kind)
        return self._load(kind, path, lambda path: load_stage(kind, path, self.dtype, self.device))

    def text_stage(self) -> TextStage:
        """The text encoder as loaded."""
        path = self.files.find("text_encoder")
        return self._load("text_encoder", path, lambda path: load_text_encoder(path, self.device))

    def vision_stage(self) -> VisionStage:
        """The image encoder."""
        path = self.files.find("vision")
        return self._load("vision", path, lambda path: load_image_encoder(path, self.device))

    def stage_a(self) -> Codec:
        """Stage A, which encodes and decodes Stage B's latents."""
        path = self.files.find("stage_a")
        return self._load("stage_a", path, lambda path: load_stage_a(path, self.device))

    def compressor(self) -> Codec:
        """The semantic compressor, with the previewer as its decoder where there is one."""
        path, previewer = self.files.find("compressor"), self.files.find_optional("previewer")
        return self._load("compressor", path, lambda path: load_compressor(path, previewer, self.device))

    def controlnet(self, file: str | Path) -> ControlNetStage:
        """A ControlNet by its path, or its name in the folder's `controlnet`."""
        path = self.files.named("controlnet", file)
        return self._load("controlnet", path, lambda path: load_controlnet(path, self.device))

    def _with_loras(self, kind: str) -> DiffusionStage:
        stage = self.stage(kind)
        patches = tuple(
            Patch(lora.adapter.name, changes, lora.strength)
            for lora in self._loras.values()
            if (changes := getattr(lora.adapter, kind)) and lora.strength
        )
        return replace(stage, patches=patches)

    def _text_with_loras(self) -> TextStage:
        text = self.text_stage()
        for lora in self._loras.values():
            if lora.text_strength:
                text = text.with_adapter(lora.adapter, lora.text_strength, lora.new_tokens)
        return text

    # The stages of a picture

    def _encode_text(self, prompts: list[str], negative: str) -> tuple[Prompt, Prompt]:
        text = self._text_with_loras()
        encoded = []
        for name, texts in (("prompt", prompts), ("negative", [negative])):
            encoded.append(text.encode(texts, self._embeddings))
            result = [encoded[-1].states, encoded[-1].pooled]
            check_stage_finite(
                result, text, f"What the text encoder gives for {name}", "lower the weights in the prompt"
            )
        return encoded[0], encoded[1]

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
            progress = StageProgress(kind, step.index + 1, step.steps, _owned(step.x0), preview)
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

    def _check_files(self, *roles: str, controls: Sequence[Control] = ()) -> None:
        """Raises CascadeError for a file that is missing, before another one is loaded."""
        for role in roles:
            self.files.find(role)
        for control in controls:
            self.files.named("controlnet", control.file)


def _check_cancelled(cancelled: threading.Event) -> None:
    if cancelled.is_set():
        raise Interrupted("The run was cancelled.")


def _repeated(latent: Tensor, batch: int) -> Tensor:
    """A latent for each image of the batch."""
    if len(latent) not in (1, batch):
        raise CascadeError(
            f"{len(latent)} latents were given for a batch of {batch}; give one, or one for each."
        )
    return latent if len(latent) == batch else latent.repeat(batch, 1, 1, 1)


def _as_output(pictures: Tensor, output: Output) -> list[Image] | Tensor:
    return _owned(pictures) if output == "tensor" else to_pil(pictures)


def _owned(tensor: Tensor) -> Tensor:
    """A copy that the caller may change in place, which PyTorch refuses for a tensor made in inference mode."""
    with torch.inference_mode(False):
        return tensor.detach().clone()


def _free_name(name: str, taken: Mapping[str, object]) -> str:
    """The name, with a number appended where it is taken."""
    number = 2
    free = name
    while free in taken:
        free = f"{name} ({number})"
        number += 1
    return free
