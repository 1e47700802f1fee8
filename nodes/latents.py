"""Latents: empty ones, a picture's, and back to a picture."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cascade_core.errors import CascadeError
from .api import io
from .hosts import host
from .hosts.run import LATENT_CHANNELS, STAGE_B_COMPRESSION
from .sockets import check_finite

CATEGORY = "Stable Cascade/latent"
COMPRESSION = 42.67  # published: 1024 pixels become 24 latent positions
COMPRESSOR_STRIDE = 32
SIZE_STEP = 8
MAX_SIZE = 16384
VAE_WORDS = {"stage_a": "Stage A", "compressor": "the semantic compressor"}


def compression_input() -> Any:
    """The same for every node that makes a Stage C latent."""
    return io.Float.Input(
        "compression",
        default=COMPRESSION,
        min=4.0,
        max=128.0,
        step=0.01,
        tooltip=(
            "Pixels for each Stage C position. 42.67 is what the networks were trained on; larger for "
            "large pictures."
        ),
    )


def stage_c_size(height: int, width: int, compression: float) -> tuple[int, int]:
    """(h, w) of the Stage C latent of a picture."""
    if not 4 <= compression <= 128:
        raise CascadeError(f"compression is {compression}; it must lie within 4 and 128 (42.67 is usual).")
    return math.ceil(height / compression), math.ceil(width / compression)


def empty_stage_b(batch: int, height: int, width: int) -> dict[str, Tensor]:
    """The Stage B latent, zeros, of pictures of that many pixels."""
    shape = (batch, LATENT_CHANNELS["stage_b"], height // STAGE_B_COMPRESSION, width // STAGE_B_COMPRESSION)
    return {"samples": zeros(shape, f"{width} × {height}")}


def zeros(shape: tuple[int, ...], size: str) -> Tensor:
    """An empty latent. size: of the picture, for the message where memory does not suffice."""
    try:
        return torch.zeros(shape)
    except RuntimeError as error:  # torch has no class of its own for this on the CPU
        raise CascadeError(
            f"{shape[0]} latents for pictures of {size} pixels do not fit into memory; choose a smaller size or "
            "batch_size."
        ) from error


def check_size(width: int | None, height: int | None) -> None:
    """A picture's sides are positive multiples of 8. None: not known yet.

    The sentence speaks of both sides, as hosts show it at each input that was looked at.
    """
    sides = {"width": width, "height": height}
    known = {name: pixels for name, pixels in sides.items() if pixels is not None}
    if all(0 < pixels <= MAX_SIZE and pixels % SIZE_STEP == 0 for pixels in known.values()):
        return
    near = {
        name: min(max(round(pixels / SIZE_STEP), 1) * SIZE_STEP, MAX_SIZE) for name, pixels in known.items()
    }
    given, better = (" × ".join(str(chosen.get(name, name)) for name in sides) for chosen in (known, near))
    raise CascadeError(
        f"the size is {given}, but each side must be a multiple of 8 from 8 to {MAX_SIZE}, such as {better}."
    )


class CascadeEmptyLatent(io.ComfyNode):
    """Where text to image starts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        side: dict[str, Any] = {"default": 1024, "min": SIZE_STEP, "max": MAX_SIZE, "step": SIZE_STEP}
        return io.Schema(
            node_id="CascadeEmptyLatent",
            display_name="Cascade Empty Latent",
            category=CATEGORY,
            description="The empty latents of both stages for a picture of this size.",
            inputs=[
                io.Int.Input("width", **side, tooltip="Width of the picture in pixels, a multiple of 8."),
                io.Int.Input("height", **side, tooltip="Height of the picture in pixels, a multiple of 8."),
                io.Int.Input(
                    "batch_size", default=1, min=1, max=4096, tooltip="How many pictures are made at once."
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
        """Before anything runs: the host checks least and greatest values, but not multiples."""
        # None comes over a link; what is no number is for the host to refuse, and ComfyUI asks all the same.
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
        shape = (batch_size, LATENT_CHANNELS["stage_c"], *stage_c_size(height, width, compression))
        stage_c = {"samples": zeros(shape, f"{width} × {height}")}
        return io.NodeOutput(stage_c, empty_stage_b(batch_size, height, width))


class CascadeEncode(io.ComfyNode):
    """Where image to image starts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CascadeEncode",
            display_name="Cascade Encode",
            category=CATEGORY,
            description="A picture as a Stage C latent, with the empty Stage B latent of its size.",
            inputs=[
                io.Vae.Input("vae", tooltip="The semantic compressor, from Load Cascade Compressor."),
                io.Image.Input("image", tooltip="The picture, of any size."),
                compression_input(),
            ],
            outputs=[
                io.Latent.Output(display_name="stage_c", tooltip="The picture's Stage C latent."),
                io.Latent.Output(
                    display_name="stage_b", tooltip="An empty Stage B latent of the picture's size."
                ),
            ],
        )

    @classmethod
    def execute(cls, vae, image, compression) -> io.NodeOutput:
        check_vae(vae, "compressor", "Cascade Encode", "Load Cascade Compressor")
        batch, height, width = image.shape[:3]
        latent_height, latent_width = stage_c_size(height, width, compression)
        size = (latent_height * COMPRESSOR_STRIDE, latent_width * COMPRESSOR_STRIDE)
        resized = F.interpolate(image[..., :3].movedim(-1, 1), size=size, mode="bicubic", antialias=True)
        stage_c = host().encode_pixels(vae, resized.clamp(0, 1).movedim(1, -1))
        check_finite([stage_c], vae, "The compressor's latent")
        whole = [max(side // SIZE_STEP, 1) * SIZE_STEP for side in (height, width)]
        return io.NodeOutput({"samples": stage_c}, empty_stage_b(batch, *whole))


class CascadeDecode(io.ComfyNode):
    """Latent to picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CascadeDecode",
            display_name="Cascade Decode",
            category=CATEGORY,
            description=(
                "Stage A turns Stage B's latent into the picture; the previewer shows a Stage C latent, "
                "small."
            ),
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
                        "Side of a tile in pixels, for large pictures on little memory. 0 decodes the whole."
                    ),
                ),
            ],
            outputs=[io.Image.Output(display_name="IMAGE", tooltip="The picture.")],
        )

    @classmethod
    def execute(cls, vae, samples, tile_size) -> io.NodeOutput:
        latent = samples["samples"]
        kind = host().describe_vae(vae) if vae is not None else ""
        channels = latent.shape[1]
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


def check_vae(vae, kind: str, node: str, loader: str) -> None:
    """Refuses a VAE of another kind by name."""
    found = host().describe_vae(vae) if vae is not None else "nothing"
    if found != kind:
        raise CascadeError(
            f"The VAE connected to {node} is {VAE_WORDS.get(found, found)}, but {VAE_WORDS[kind]} is "
            "expected; "
            f"connect {loader}."
        )
