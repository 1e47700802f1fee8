"""VAE without ComfyUI: Stage A, or the semantic compressor with the previewer as its decoder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....cascade_core import checkpoints
from ....cascade_core.engine.vqgan import DecoderEngine
from ....cascade_core.errors import CascadeError
from ....cascade_core.networks import activations
from ....cascade_core.networks.tiles import PREVIEWER_HALO, PREVIEWER_SIDE, decode_halo, encode_halo
from .device import on_device, picture_dtype
from .tiled import Tiled

SCALE_FACTOR = 0.43  # LATENT sockets carry the codebook's units: this times what Stage B diffuses


@dataclass(frozen=True)
class HeadlessVAE:
    """`encoder` and `decoder` are the same network for Stage A; the compressor may lack a decoder."""

    kind: str
    encoder: Any  # StageA or SemanticCompressor
    decoder: Any  # StageA, Previewer or None
    files: tuple[str, str]  # of the encoder and the decoder
    engine: Any = None  # DecoderEngine of Stage A

    def networks(self) -> list[tuple[nn.Module, str]]:
        """Each network with the name of its file."""
        pairs = zip((self.encoder, self.decoder), self.files, strict=True)
        return [(network, file) for network, file in pairs if network is not None]


def load_stage_a(path: Path) -> HeadlessVAE:
    network: Any
    network, _, _ = checkpoints.load_model(path, expect="stage_a", dtype=picture_dtype())
    return HeadlessVAE("stage_a", network, network, (path.name, path.name), DecoderEngine(network))


def load_compressor(compressor: Path, previewer: Path | None) -> HeadlessVAE:
    encoder, _, _ = checkpoints.load_model(compressor, expect="compressor", dtype=torch.float32)
    decoder, decoder_file = None, ""
    if previewer is not None:
        decoder, _, _ = checkpoints.load_model(previewer, expect="previewer", dtype=torch.float32)
        decoder_file = previewer.name
    return HeadlessVAE("compressor", encoder, decoder, (compressor.name, decoder_file))


def describe_vae(vae: Any) -> str:
    return vae.kind if isinstance(vae, HeadlessVAE) else f"a {type(vae).__name__}"


@torch.inference_mode()
def encode_pixels(vae: HeadlessVAE, image: Tensor, tile: int = 0) -> Tensor:
    pixels = image.movedim(-1, 1)[:, :3]
    network = vae.encoder
    if vae.kind != "stage_a":
        working = 4 * activations.compressor(network.config, len(pixels), *pixels.shape[-2:])
        return on_device(network, lambda device: network(pixels.to(device, torch.float32)).cpu(), working)
    side = 2**network.config.levels  # pixels of a latent position
    encode = Tiled(network, network.encode, encode_halo(network.config), activations.stage_a, down=side)
    return encode(pixels, tile // side) * network.config.scale_factor


@torch.inference_mode()
def decode_latent(vae: HeadlessVAE, latent: Tensor, tile: int) -> Tensor:
    if vae.decoder is None:
        raise CascadeError(
            "This VAE only encodes: choose a previewer file in its loader to see Stage C latents."
        )
    network = vae.decoder
    if vae.kind == "stage_a":
        latent = latent / network.config.scale_factor
        side, halo = 2**network.config.levels, decode_halo(network.config)

        def run(part: Tensor) -> Tensor:
            if not part.is_cuda:  # the engine would gain a hundredth of a picture's time, and round otherwise
                return network.decode(part)
            return vae.engine(part)

        decode = Tiled(network, run, halo, activations.stage_a, up=side, consumer=vae.engine)
    else:
        side = PREVIEWER_SIDE
        decode = Tiled(network, network, PREVIEWER_HALO, activations.previewer, up=side)
    return decode(latent, tile // side).clamp(0, 1).movedim(1, -1)
