"""VAE without ComfyUI: Stage A, or the semantic compressor with the previewer, of the core."""

from pathlib import Path
from typing import Any

from torch import Tensor

from ....cascade_core.stages import codec
from ....cascade_core.stages.codec import Codec
from .device import compute_device
from .values import words_for


def load_stage_a(path: Path) -> Codec:
    return codec.load_stage_a(path, compute_device())


def load_compressor(compressor: Path, previewer: Path | None) -> Codec:
    return codec.load_compressor(compressor, previewer, compute_device())


def describe_vae(vae: Any) -> str:
    return vae.kind if isinstance(vae, Codec) else words_for(vae)


def encode_pixels(vae: Codec, image: Tensor, tile_pixels: int = 0) -> Tensor:
    return vae.encode(image, tile_pixels)


def decode_latent(vae: Codec, latent: Tensor, tile_pixels: int) -> Tensor:
    return vae.decode(latent, tile_pixels)
