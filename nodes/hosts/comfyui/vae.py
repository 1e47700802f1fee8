# pyright: reportMissingImports=false
"""VAE in ComfyUI: a subclass of its own VAE around Stage A, or around the compressor and the previewer."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.ldm.cascade.stage_a
import comfy.ldm.cascade.stage_c_coder
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import torch
from torch import Tensor, nn

from ....cascade_core import checkpoints
from ....cascade_core.checkpoints.carried import carried_config
from ....cascade_core.engine.vqgan import DecoderEngine
from ....cascade_core.errors import CascadeError
from ....cascade_core.networks import activations
from ....cascade_core.networks.config import StageAConfig
from ....cascade_core.networks.inference import infer_config
from ....cascade_core.networks.tiles import (
    PREVIEWER_HALO,
    PREVIEWER_SIDE,
    decode_halo,
    encode_halo,
    join_tiles,
)
from ....cascade_core.placement import out_of_memory
from ....cascade_core.stages.diffusion import SCALE_FACTOR
from .hosted import Hosted, WholeLayers
from .progress import notify
from .weights import remember_file


class HostedStageA(Hosted):
    """Stage A with latents in the published codebook's units, as in the host's own, whatever the file's factor.

    On a card it is decoded by the engine.
    """

    def __init__(self, network: nn.Module):
        super().__init__(network)
        self.engine = DecoderEngine(self.network, notify)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Drops the engine's derived weights and its graphs where the host moves the network."""
        self.engine.forget()
        return super()._apply(fn, recurse)

    def encode(self, image: Tensor) -> Tensor:
        return self.network.encode(image) * SCALE_FACTOR

    def decode(self, latent: Tensor) -> Tensor:
        decode: Any = self.engine if latent.is_cuda else self.network.decode
        return decode(latent / SCALE_FACTOR)


class HostedCoder(nn.Module):
    """Compressor as encoder and previewer as decoder, under the names of the host's own pair.

    The host asks for the memory of a decoding first, so a missing previewer is reported there.
    """

    def __init__(self, encoder: nn.Module, previewer: nn.Module | None):
        super().__init__()
        self.encoder = encoder
        self.previewer = previewer

    def encode(self, image: Tensor) -> Tensor:
        return self.encoder(image)

    def decode(self, latent: Tensor) -> Tensor:
        return self.decoder(latent)

    @property
    def decoder(self) -> Any:
        """The previewer. Raises CascadeError where there is none."""
        if self.previewer is None:
            raise CascadeError(
                "This VAE only encodes: choose a previewer file in its loader to see Stage C latents."
            )
        return self.previewer

    def decoding_values(self, shape: Sequence[int]) -> int:
        """Values alive while latents of a shape are decoded. Raises CascadeError without a previewer."""
        return activations.previewer(self.decoder.config, 1, *shape[-2:])


class CascadeVAE(comfy.sd.VAE):
    """Host's VAE around a network of ours, whose pictures are in [0, 1] for encoding and decoding."""

    def __init__(self, network: nn.Module):
        with _quiet():
            super().__init__(sd={})  # sets all attributes that this version of the host has
        self.first_stage_model = network.eval().requires_grad_(False)
        self.process_input = lambda image: image
        # In place, since newer hosts ignore what it returns.
        self.process_output = lambda image: image.clamp_(0.0, 1.0)
        self.device = comfy.model_management.vae_device()
        self.vae_dtype = comfy.model_management.vae_dtype(self.device, self.working_dtypes)
        self.output_device = comfy.model_management.intermediate_device()
        network.to(self.vae_dtype)
        archive_dtypes = getattr(comfy.model_management, "archive_model_dtypes", None)
        if archive_dtypes is not None:
            archive_dtypes(network)
        offload_device = comfy.model_management.vae_offload_device()
        # Newer hosts page larger networks; this one is not paged, since the engine needs weights at fixed addresses.
        patcher_class = comfy.model_patcher.ModelPatcher
        self.patcher = patcher_class(network, load_device=self.device, offload_device=offload_device)

    def get_sd(self) -> dict[str, Tensor]:
        """The tensors that the host saves, with each network's configuration where they do not determine it."""
        tensors, stage = dict(super().get_sd()), self.first_stage_model
        networks = {"": stage.network} if isinstance(stage, HostedStageA) else dict(stage.named_children())
        for name, network in networks.items():
            prefix = f"{name}." if name else ""
            tensors |= {prefix + key: value for key, value in carried_config(network).items()}
        return tensors

    def decode(self, samples_in: Tensor, vae_options: dict[str, Any] | None = None) -> Tensor:
        """(B, C, h, w) -> (B, H, W, 3) in [0, 1]. On a card, clamps and permutes there, before the copy."""
        if self.device.type == "cuda" and samples_in.ndim == 4:
            try:
                return self._decode_whole(samples_in)
            except Exception as error:
                if not out_of_memory(error):
                    raise
            logging.warning("The picture does not fit beside what the card holds; it is decoded in tiles.")
        return super().decode(samples_in, vae_options or {})

    def _decode_whole(self, latents: Tensor) -> Tensor:
        management = comfy.model_management
        memory = self.memory_used_decode(latents.shape, self.vae_dtype)
        management.load_models_gpu([self.patcher], memory_required=memory)
        count = max(1, int(management.get_free_memory(self.device) / memory))
        stage: Any = self.first_stage_model
        pictures = []
        for part in latents.split(count):
            image = stage.decode(part.to(self.vae_dtype).to(self.device))
            image = image.float().clamp_(0.0, 1.0).movedim(1, -1).contiguous()
            pictures.append(image.to(self.output_device))
        return pictures[0] if len(pictures) == 1 else torch.cat(pictures)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses the host's warning that an empty state dict holds no VAE."""
    logger = logging.getLogger()
    logger.addFilter(_not_about_empty_vae)
    try:
        yield
    finally:
        logger.removeFilter(_not_about_empty_vae)


def _not_about_empty_vae(record: logging.LogRecord) -> bool:
    return "No VAE weights detected" not in record.getMessage()


def load_stage_a(path: Path) -> CascadeVAE:
    network: Any
    network, _, config = checkpoints.load_model(
        path, expect="stage_a", operations=WholeLayers(comfy.ops.disable_weight_init)
    )
    hosted = HostedStageA(network)
    vae = CascadeVAE(hosted)
    hosted.engine.compile_in_background(vae.device)
    vae.downscale_ratio = vae.upscale_ratio = 2 ** config["levels"]
    vae.latent_channels = config["c_latent"]
    size, side = comfy.model_management.dtype_size, vae.downscale_ratio  # for one picture, as the host asks
    vae.memory_used_decode = lambda shape, dtype: (
        size(dtype) * activations.stage_a(network.config, 1, *shape[-2:])
    )
    vae.memory_used_encode = lambda shape, dtype: (
        size(dtype) * activations.stage_a(network.config, 1, shape[-2] // side, shape[-1] // side)
    )
    remember_file(vae, path.name)
    return vae


def load_compressor(compressor: Path, previewer: Path | None) -> CascadeVAE:
    encoder: Any
    encoder, _, config = checkpoints.load_model(
        compressor, expect="compressor", operations=WholeLayers(comfy.ops.manual_cast)
    )
    encoder.config.check_stride(compressor.name)
    decoder: Any = None
    if previewer is not None:
        decoder, _, _ = checkpoints.load_model(
            previewer, expect="previewer", operations=WholeLayers(comfy.ops.manual_cast)
        )
    coder = HostedCoder(encoder, decoder)
    vae = CascadeVAE(coder)
    vae.downscale_ratio = 32
    vae.upscale_ratio = 8
    vae.latent_channels = config["c_latent"]
    size = comfy.model_management.dtype_size
    vae.memory_used_encode = lambda shape, dtype: (
        size(dtype) * activations.compressor(encoder.config, 1, *shape[-2:])
    )
    vae.memory_used_decode = lambda shape, dtype: size(dtype) * coder.decoding_values(shape)
    remember_file(vae, compressor.name if previewer is None else f"{compressor.name} or {previewer.name}")
    return vae


def describe_vae(vae: Any) -> str:
    """Kind of our VAEs and the host's own, by their networks."""
    network = getattr(vae, "first_stage_model", None)
    if isinstance(network, HostedStageA | comfy.ldm.cascade.stage_a.StageA):
        return "stage_a"
    if isinstance(network, HostedCoder | comfy.ldm.cascade.stage_c_coder.StageC_coder):
        return "compressor"
    return f"a {type(network).__name__} VAE"


def encode_pixels(vae: Any, image: Tensor, tile_pixels: int = 0) -> Tensor:
    image = image[..., :3]
    if not tile_pixels or describe_vae(vae) != "stage_a":
        # The compressor weights its channels by averages over the whole picture, so it cannot be tiled.
        return vae.encode(image).float()
    config = stage_a_config(vae)
    side = 2**config.levels  # pixels of a latent position

    def encode(pixels: Tensor) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        return vae.encode(pixels.movedim(1, -1)).float()

    return join_tiles(encode, image.movedim(-1, 1), tile_pixels // side, encode_halo(config), down=side)


def decode_latent(vae: Any, latent: Tensor, tile_pixels: int) -> Tensor:
    if not tile_pixels:
        return vae.decode(latent).float().clamp(0.0, 1.0)
    if describe_vae(vae) == "stage_a":
        config = stage_a_config(vae)
        side, halo = 2**config.levels, decode_halo(config)
    else:
        side, halo = PREVIEWER_SIDE, PREVIEWER_HALO

    def decode(latent_tile: Tensor) -> Tensor:  # with the host's memory management, for a tile's memory
        comfy.model_management.throw_exception_if_processing_interrupted()
        return vae.decode(latent_tile).float().clamp(0.0, 1.0).movedim(-1, 1)

    return join_tiles(decode, latent, tile_pixels // side, halo, up=side).movedim(1, -1)


def stage_a_config(vae: Any) -> StageAConfig:
    """Configuration of our Stage A, or of the host's own, inferred from its weights."""
    network = vae.first_stage_model
    if isinstance(network, HostedStageA):
        return network.network.config
    _, config = infer_config(network.state_dict())
    return StageAConfig.from_dict(config)
