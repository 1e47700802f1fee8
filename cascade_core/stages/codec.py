"""Pictures to latents and back: Stage A, or the semantic compressor with the previewer as its decoder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import load_model
from ..engine.vqgan import DecoderEngine
from ..errors import CascadeError
from ..networks import activations
from ..networks.tiles import PREVIEWER_HALO, PREVIEWER_SIDE, decode_halo, encode_halo
from .device import ComputeDevice
from .diffusion import SCALE_FACTOR
from .tiled import Tiled


@dataclass(frozen=True)
class Codec:
    """An encoder and a decoder of latents, in the units of LATENT sockets.

    Stage A's latents are SCALE_FACTOR (0.43) times those that Stage B diffuses, as in ComfyUI, whatever the file's
    factor. `encoder` and `decoder` are the same network for Stage A; the compressor may lack a decoder.
    """

    kind: str  # stage_a or compressor
    encoder: Any  # StageA or SemanticCompressor
    decoder: Any  # StageA, Previewer or None
    files: tuple[str, str]  # of the encoder and the decoder
    device: ComputeDevice
    engine: Any = None  # of Stage A's decoder

    def networks(self) -> list[tuple[nn.Module, str]]:
        """Each network with its file's name."""
        pairs = zip((self.encoder, self.decoder), self.files, strict=True)
        return [(network, file) for network, file in pairs if network is not None]

    @torch.inference_mode()
    def encode(self, pictures: Tensor, tile_pixels: int = 0) -> Tensor:
        """(B, H, W, 3) in [0, 1] -> (B, C, h, w) float32 on the CPU.

        tile_pixels: side of the tiles in which Stage A reads; 0: as the memory allows.
        """
        pixels = pictures.movedim(-1, 1)[:, :3]
        network = self.encoder
        if self.kind != "stage_a":
            workspace = 4 * activations.compressor(network.config, len(pixels), *pixels.shape[-2:])
            return self.device.run(
                network, lambda device: network(pixels.to(device, torch.float32)).cpu(), workspace
            )
        side = 2**network.config.levels  # pixels of a latent position
        halo = encode_halo(network.config)
        encode = Tiled(self.device, network, network.encode, halo, activations.stage_a, down=side)
        return encode(pixels, tile_pixels // side) * SCALE_FACTOR

    @torch.inference_mode()
    def decode(self, latent: Tensor, tile_pixels: int = 0) -> Tensor:
        """(B, C, h, w) -> (B, H, W, 3) in [0, 1], float32 on the CPU. tile_pixels: 0: as the memory allows.

        Raises CascadeError where there is no decoder.
        """
        network = self.decoder
        if network is None:
            raise CascadeError(
                "This VAE only encodes: choose a previewer file in its loader to see Stage C latents."
            )
        if self.kind == "stage_a":
            side, halo = 2**network.config.levels, decode_halo(network.config)
            latent = latent / SCALE_FACTOR
            decode = Tiled(
                self.device, network, self._decode, halo, activations.stage_a, up=side, consumer=self.engine
            )
        else:
            side = PREVIEWER_SIDE
            decode = Tiled(self.device, network, network, PREVIEWER_HALO, activations.previewer, up=side)
        return decode(latent, tile_pixels // side).clamp(0, 1).movedim(1, -1)

    def _decode(self, latent: Tensor) -> Tensor:
        """Runs Stage A's decoder, with the engine on a card."""
        if not latent.is_cuda:  # the engine would save a hundredth of a picture's time, and round differently
            return self.decoder.decode(latent)
        return self.engine(latent)


def load_stage_a(path: Path, device: ComputeDevice) -> Codec:
    """Stage A from a file of any layout."""
    network: Any
    network, _, _ = load_model(path, expect="stage_a", dtype=device.picture_dtype(), placed=device.places)
    engine = DecoderEngine(network, device.observer.notify)
    engine.compile_in_background(device.device)
    return Codec("stage_a", network, network, (path.name, path.name), device, engine)


def load_compressor(compressor: Path, previewer: Path | None, device: ComputeDevice) -> Codec:
    """The semantic compressor, and the previewer as its decoder where there is one."""
    encoder: Any
    encoder, _, _ = load_model(compressor, expect="compressor", dtype=torch.float32, placed=device.places)
    encoder.config.check_stride(compressor.name)
    decoder, decoder_file = None, ""
    if previewer is not None:
        decoder, _, _ = load_model(previewer, expect="previewer", dtype=torch.float32, placed=device.places)
        decoder_file = previewer.name
    return Codec("compressor", encoder, decoder, (compressor.name, decoder_file), device)
