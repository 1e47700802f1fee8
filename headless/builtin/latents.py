"""ComfyUI's nodes for latents, empty and of pictures, and its decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...cascade_core.errors import CascadeError
from ...cascade_core.geometry import LATENT_CHANNELS, MAX_SIZE, check_pixels
from ...cascade_core.limits import BATCH
from ...nodes.api import io
from ...nodes.hosts import host
from ...nodes.latents import CascadeDecode
from ...nodes.sockets import check_connected, check_finite, check_picture, check_vae
from .images import scaled

CATEGORY = "latent/stable_cascade"
COMPRESSOR_STRIDE, STAGE_A_STRIDE = 32, 4  # pixels of a latent position


def _compression_input() -> io.Int.Input:
    return io.Int.Input(
        "compression", default=42, min=4, max=128, tooltip="Pixels per position of Stage C's latent."
    )


def _latent_outputs() -> list[Any]:
    return [io.Latent.Output(display_name="stage_c"), io.Latent.Output(display_name="stage_b")]


def _empty(kind: str, batch: int, height: int, width: int) -> dict[str, Tensor]:
    return {"samples": torch.zeros(batch, LATENT_CHANNELS[kind], height, width)}


class StableCascadeEmptyLatentImage(io.ComfyNode):
    """Makes the empty latents of both stages."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        side: dict[str, Any] = {"default": 1024, "min": 256, "max": MAX_SIZE, "step": 8}
        return io.Schema(
            node_id="StableCascade_EmptyLatentImage",
            display_name="StableCascade_EmptyLatentImage",
            category=CATEGORY,
            description="The empty latents of both stages for a picture of this size.",
            inputs=[
                io.Int.Input("width", **side, tooltip="Width of the picture in pixels."),
                io.Int.Input("height", **side, tooltip="Height of the picture in pixels."),
                _compression_input(),
                io.Int.Input("batch_size", default=1, **BATCH.input(), tooltip="How many pictures."),
            ],
            outputs=_latent_outputs(),
        )

    @classmethod
    def execute(cls, width, height, compression, batch_size=1) -> io.NodeOutput:
        check_pixels(width, height, batch_size)
        return io.NodeOutput(
            _empty("stage_c", batch_size, height // compression, width // compression),
            _empty("stage_b", batch_size, height // STAGE_A_STRIDE, width // STAGE_A_STRIDE),
        )


class StableCascadeStageCVAEEncode(io.ComfyNode):
    """Encodes a picture as a Stage C latent."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StableCascade_StageC_VAEEncode",
            display_name="StableCascade_StageC_VAEEncode",
            category=CATEGORY,
            description="A picture as a Stage C latent, with the empty Stage B latent of its size.",
            inputs=[
                io.Image.Input("image", tooltip="The picture."),
                io.Vae.Input("vae", tooltip="The VAE of Stage C's checkpoint."),
                _compression_input(),
            ],
            outputs=_latent_outputs(),
        )

    @classmethod
    def execute(cls, image, vae, compression) -> io.NodeOutput:
        check_vae(vae, "compressor", "StableCascade_StageC_VAEEncode", "Stage C's checkpoint")
        check_picture(image, "image")
        height, width = image.shape[1:3]
        if min(height, width) < compression:
            raise CascadeError(
                f"The picture is {width} × {height} pixels, but a position of Stage C covers {compression}; give a "
                "larger one, or a smaller compression."
            )
        wide, high = (side // compression * COMPRESSOR_STRIDE for side in (width, height))
        pixels = scaled(image[..., :3].movedim(-1, 1), wide, high, "bicubic", "center").movedim(1, -1)
        latent = host().encode_pixels(vae, pixels)
        check_finite([latent], vae, "The compressor's latent")
        return io.NodeOutput(
            {"samples": latent}, _empty("stage_b", len(latent), height // 8 * 2, width // 8 * 2)
        )


class StableCascadeSuperResolutionControlnet(io.ComfyNode):
    """Makes the hint of the super-resolution ControlNet, and the empty latents of a picture twice as large."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StableCascade_SuperResolutionControlnet",
            display_name="StableCascade_SuperResolutionControlnet",
            category=CATEGORY,
            description="The hint of the super-resolution ControlNet, and empty latents for twice the size.",
            inputs=[
                io.Image.Input("image", tooltip="The small picture."),
                io.Vae.Input("vae", tooltip="The VAE of Stage B's checkpoint."),
            ],
            outputs=[io.Image.Output(display_name="controlnet_input"), *_latent_outputs()],
            is_experimental=True,
        )

    @classmethod
    def execute(cls, image, vae) -> io.NodeOutput:
        hint = _encode(image, vae).movedim(1, -1)
        batch, height, width = image.shape[:3]
        return io.NodeOutput(
            hint,
            _empty("stage_c", batch, height // 16, width // 16),
            _empty("stage_b", batch, height // 2, width // 2),
        )


class VAEDecode(io.ComfyNode):
    """Decodes a latent into a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAEDecode",
            display_name="VAE Decode",
            category="latent",
            description="Turns Stage B's latent into the picture, or Stage C's into a small rough one.",
            inputs=[
                io.Latent.Input("samples", tooltip="The latent."),
                io.Vae.Input("vae", tooltip="The VAE of the checkpoint that sampled it."),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, samples, vae) -> io.NodeOutput:
        return CascadeDecode.execute(vae, samples, 0)


class VAEEncode(io.ComfyNode):
    """Encodes a picture as a latent."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VAEEncode",
            display_name="VAE Encode",
            category="latent",
            description="Turns a picture into the latent of Stage A, or of the compressor.",
            inputs=[
                io.Image.Input("pixels", tooltip="The picture."),
                io.Vae.Input("vae", tooltip="The VAE of a checkpoint."),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, pixels, vae) -> io.NodeOutput:
        return io.NodeOutput({"samples": _encode(pixels, vae)})


def _encode(image: Tensor, vae: Any) -> Tensor:
    """A picture's latent; a remainder smaller than a position is cut off on both sides, as in ComfyUI."""
    check_connected(vae, "The VAE", "the checkpoint's")
    check_picture(image, "image")
    kind = host().describe_vae(vae) if vae is not None else "nothing"
    if kind != "compressor":
        check_vae(vae, "stage_a", "VAE Encode", "Stage B's checkpoint")
    stride = STAGE_A_STRIDE if kind == "stage_a" else COMPRESSOR_STRIDE
    if min(image.shape[1:3]) < stride:
        raise CascadeError(
            f"The picture has a side under {stride} pixels, of which nothing is left; give a larger one."
        )
    for dim in (1, 2):
        rest = image.shape[dim] % stride
        image = image.narrow(dim, rest // 2, image.shape[dim] - rest)
    latent = host().encode_pixels(vae, image[..., :3])
    check_finite([latent], vae, "The encoded picture")
    return latent
