"""Nodes for latents: empty ones, encoding, upscaling and decoding."""

from typing import Any

import torch
from torch.nn import functional as F

from ..cascade_core import limits
from ..cascade_core.errors import CascadeError
from ..cascade_core.geometry import (
    LATENT_CHANNELS,
    MAX_SIZE,
    SIZE_STEP,
    check_pixels,
    check_size,
    compressor_size,
    stage_c_size,
    whole_size,
)
from ..cascade_core.hints.masks import latent_mask
from ..cascade_core.pictures import resized
from .api import io, searched_as
from .hosts import host
from .sizes import chosen_size, compression_input, empty_stage_b, empty_stage_c, picture_report
from .sockets import (
    VAE_WORDS,
    check_connected,
    check_finite,
    check_mask,
    check_picture,
    check_vae,
    latent_shape,
)

CATEGORY = "Stable Cascade/latent"
MAX_GROW = limits.GROW.most  # positions of Stage C


class CascadeEmptyLatent(io.ComfyNode):
    """Makes the empty latents of both stages, for text to image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        side: dict[str, Any] = {"default": 1024, "min": SIZE_STEP, "max": MAX_SIZE, "step": SIZE_STEP}
        return io.Schema(
            node_id="CascadeEmptyLatent",
            display_name="Cascade Empty Latent",
            category=CATEGORY,
            description="The empty latents of both stages for a picture of this size.",
            **searched_as("stable cascade, size, resolution, aspect ratio, text to image, txt2img"),
            inputs=[
                io.Int.Input("width", **side, tooltip="Width of the picture in pixels, a multiple of 8."),
                io.Int.Input("height", **side, tooltip="Height of the picture in pixels, a multiple of 8."),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    **limits.BATCH.input(),
                    tooltip="How many pictures are made at once.",
                ),
                compression_input(),
            ],
            outputs=[
                io.Latent.Output(display_name="stage_c", tooltip="For Cascade Prior Sampler."),
                io.Latent.Output(display_name="stage_b", tooltip="For Cascade Decoder Sampler."),
            ],
        )

    @classmethod
    def validate_inputs(cls, width=None, height=None) -> bool | str:
        """Checks multiples before anything runs; the host checks minimum and maximum."""
        # None: the value comes over a link. The host refuses values that are not numbers, but ComfyUI still calls this.
        sides = [side if isinstance(side, int) else None for side in (width, height)]
        try:
            check_size(*sides)
        except CascadeError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, width, height, batch_size, compression) -> io.NodeOutput:
        check_size(width, height)
        if batch_size < 1:
            raise CascadeError(f"batch_size is {batch_size}; at least one picture must be made.")
        check_pixels(width, height, batch_size)
        stage_c = empty_stage_c(batch_size, height, width, compression)
        return io.NodeOutput(stage_c, empty_stage_b(batch_size, height, width))


def resize_input(side: str, other_side: str) -> Any:
    """Input for a side of a picture that is resized before it is encoded."""
    return io.Int.Input(
        side,
        default=0,
        min=0,
        max=MAX_SIZE,
        step=SIZE_STEP,
        optional=True,
        tooltip=(
            f"The {side} in pixels to which the picture is resized first, such as for a second, larger pass. 0 keeps "
            f"its own, or follows the {other_side}."
        ),
    )


class CascadeEncode(io.ComfyNode):
    """Encodes a picture for image to image and inpainting."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CascadeEncode",
            display_name="Cascade Encode",
            category=CATEGORY,
            description=(
                "Turns a picture into a Stage C latent, with the Stage B latent of its size: empty, or the "
                "picture's own where Stage A is connected."
            ),
            **searched_as("stable cascade, img2img, image to image, vae encode, inpaint, mask"),
            inputs=[
                io.Vae.Input("vae", tooltip="The semantic compressor, from Load Cascade Compressor."),
                io.Image.Input("image", tooltip="The picture, of any size."),
                compression_input(),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="For inpainting: 1 where the samplers may change the picture.",
                ),
                io.Vae.Input(
                    "stage_a",
                    optional=True,
                    tooltip=(
                        "Stage A: the Stage B latent is then the picture's own, so that Stage B keeps what lies "
                        "outside the mask, or works the picture over at a low denoise."
                    ),
                ),
                io.Int.Input(
                    "tile_size",
                    default=0,
                    min=0,
                    max=MAX_SIZE,
                    step=64,
                    optional=True,
                    tooltip="Side in pixels of the tiles in which Stage A reads a large picture. 0 reads the whole.",
                ),
                resize_input("width", "height"),
                resize_input("height", "width"),
                io.Int.Input(
                    "grow",
                    default=0,
                    min=0,
                    max=MAX_GROW,
                    optional=True,
                    tooltip=(
                        "By how many Stage C positions, of about 43 pixels each, Stage C's mask is wider "
                        "than the given one. 1 with the inpainting ControlNet, which shows where the hole "
                        "is; 0 without it."
                    ),
                ),
                io.Boolean.Input(
                    "soft",
                    default=False,
                    optional=True,
                    tooltip=(
                        "Keeps the mask's grey values, by which Differential Diffusion lets each place change for a "
                        "part of the steps. Off: each position changes or does not."
                    ),
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="stage_c", tooltip="The picture's Stage C latent."),
                io.Latent.Output(
                    display_name="stage_b",
                    tooltip="A Stage B latent of the picture's size: empty, or with Stage A the picture's.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        vae,
        image,
        compression,
        mask=None,
        stage_a=None,
        tile_size=0,
        width=0,
        height=0,
        grow=0,
        soft=False,
    ) -> io.NodeOutput:
        check_vae(vae, "compressor", "Cascade Encode", "Load Cascade Compressor")
        check_picture(image, "image")
        if mask is not None:
            check_mask(mask, "mask")
        if not 0 <= grow <= MAX_GROW:
            raise CascadeError(f"grow is {grow}; it must lie within 0 and {MAX_GROW} positions of Stage C.")
        batch = len(image)
        height, width = chosen_size(image.shape[1:3], height, width)
        check_pixels(width, height, batch)
        size = stage_c_size(height, width, compression)
        pixels = resized(image, compressor_size(height, width, compression))
        stage_c: dict[str, Any] = {"samples": host().encode_pixels(vae, pixels), "compression": compression}
        check_finite([stage_c["samples"]], vae, "The compressor's latent")
        picture_size = whole_size(height, width)
        stage_b = empty_stage_b(batch, *picture_size)
        if stage_a is not None:
            check_vae(stage_a, "stage_a", "Cascade Encode's stage_a", "Load Stage A VAE")
            stage_b = {"samples": host().encode_pixels(stage_a, resized(image, picture_size), tile_size)}
            check_finite(stage_b.values(), stage_a, "Stage A's latent")
        if mask is not None:
            stage_c["noise_mask"] = latent_mask(mask, batch, size, grow, soft)
            if stage_a is not None:  # an empty latent has no content to keep
                stage_b["noise_mask"] = latent_mask(mask, batch, stage_b["samples"].shape[-2:], soft=soft)
        return io.NodeOutput(stage_c, stage_b, ui=picture_report(image))


class CascadeUpscaleLatent(io.ComfyNode):
    """Upscales a Stage C latent between two passes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        side: dict[str, Any] = {"default": 2048, "min": SIZE_STEP, "max": MAX_SIZE, "step": SIZE_STEP}
        return io.Schema(
            node_id="CascadeUpscaleLatent",
            display_name="Cascade Upscale Latent",
            category=CATEGORY,
            description=(
                "Enlarges a Stage C latent, and gives the empty Stage B latent of that size. So a picture "
                "is composed at the size that Stage C was trained at, then made at the larger one."
            ),
            **searched_as("stable cascade, hires fix, upscale, size, high resolution"),
            inputs=[
                io.Latent.Input(
                    "stage_c", tooltip="The latent of the first pass, from Cascade Prior Sampler."
                ),
                io.Int.Input(
                    "width", **side, tooltip="Width of the larger picture in pixels, a multiple of 8."
                ),
                io.Int.Input(
                    "height", **side, tooltip="Height of the larger picture in pixels, a multiple of 8."
                ),
                compression_input(),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="stage_c",
                    tooltip=(
                        "For Cascade Decoder Sampler, or first for Cascade Prior Sampler at a low denoise, which adds "
                        "what the larger size has room for."
                    ),
                ),
                io.Latent.Output(display_name="stage_b", tooltip="For Cascade Decoder Sampler."),
            ],
        )

    @classmethod
    def validate_inputs(cls, width=None, height=None) -> bool | str:
        return CascadeEmptyLatent.validate_inputs(width, height)

    @classmethod
    def execute(cls, stage_c, width, height, compression) -> io.NodeOutput:
        check_size(width, height)
        shape = latent_shape(stage_c, "stage_c of Cascade Upscale Latent")
        if len(shape) != 4 or shape[1] != LATENT_CHANNELS["stage_c"] or 0 in shape:
            raise CascadeError(
                f"stage_c of Cascade Upscale Latent has the shape {shape}, but Stage C's latent has 16 "
                "channels; connect Cascade Prior Sampler."
            )
        samples = stage_c["samples"]
        check_pixels(width, height, len(samples))
        # Of all filters, bilinear comes nearest to the compressor's latent of the enlarged picture.
        size = stage_c_size(height, width, compression)
        larger = F.interpolate(samples, size=size, mode="bilinear", align_corners=False)
        stage_b = empty_stage_b(len(samples), height, width)
        indices = {name: stage_c[name] for name in ("batch_index",) if name in stage_c}
        return io.NodeOutput(
            {**stage_c, "samples": larger, "compression": compression}, {**stage_b, **indices}
        )


class CascadeDecode(io.ComfyNode):
    """Decodes a latent into a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CascadeDecode",
            display_name="Cascade Decode",
            category=CATEGORY,
            description=(
                "Turns a latent into a picture: Stage B's by Stage A, or Stage C's, small and rough, by the previewer."
            ),
            **searched_as("stable cascade, vae decode"),
            inputs=[
                io.Vae.Input("vae", tooltip="Stage A for Stage B's latent, or the compressor for Stage C's."),
                io.Latent.Input("samples", tooltip="The latent to decode."),
                io.Int.Input(
                    "tile_size",
                    default=0,
                    min=0,
                    max=MAX_SIZE,
                    step=64,
                    tooltip=(
                        "Side of a tile in pixels, for large pictures on little memory; what comes out is the same. 0 "
                        "decodes the whole."
                    ),
                ),
            ],
            outputs=[io.Image.Output(display_name="IMAGE", tooltip="The picture.")],
        )

    @classmethod
    def execute(cls, vae, samples, tile_size) -> io.NodeOutput:
        check_connected(vae, "The VAE of Cascade Decode", "Load Stage A VAE")
        shape = latent_shape(samples, "samples of Cascade Decode")
        if len(shape) != 4 or 0 in shape:
            raise CascadeError(
                f"Cascade Decode got a latent of the shape {shape}, but (batch, channels, height, width) is expected; "
                "connect Cascade Decoder Sampler."
            )
        latent, channels = samples["samples"], shape[1]
        kind = host().describe_vae(vae) if vae is not None else ""
        if kind == "stage_a" and channels != LATENT_CHANNELS["stage_b"]:
            raise CascadeError(
                f"Cascade Decode got a latent of {channels} channels, but Stage A decodes the "
                f"{LATENT_CHANNELS['stage_b']} "
                "channels of Stage B's; connect Cascade Decoder Sampler, or the compressor to see Stage "
                "C's latent."
            )
        if kind == "compressor" and channels != LATENT_CHANNELS["stage_c"]:
            raise CascadeError(
                f"Cascade Decode got a latent of {channels} channels, but the previewer decodes the "
                f"{LATENT_CHANNELS['stage_c']} channels of Stage C's; connect Load Stage A VAE for Stage B's."
            )
        if kind not in VAE_WORDS:
            check_vae(vae, "stage_a", "Cascade Decode", "Load Stage A VAE")
        if not torch.isfinite(latent).all():
            raise CascadeError("Cascade Decode got a latent that holds NaN or infinity; sample it anew.")
        picture = host().decode_latent(vae, latent, tile_size)
        check_finite([picture], vae, "The decoded picture")
        return io.NodeOutput(picture)
