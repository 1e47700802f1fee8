"""ComfyUI's nodes for pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...cascade_core.errors import CascadeError
from ...cascade_core.geometry import MAX_SIZE, check_pixels
from ...cascade_core.limits import BATCH
from ...nodes.api import io
from ...nodes.sockets import check_mask, check_picture
from .canny import canny_edges
from .elsewhere import only

METHODS = ["nearest-exact", "bilinear", "area", "bicubic"]
CROPS = ["disabled", "center"]


def scaled(pixels: Tensor, width: int, height: int, method: str, crop: str) -> Tensor:
    """Pixels (B, C, H, W) resized as ComfyUI does it; crop `center` cuts them to the new proportions first."""
    check_pixels(width, height, len(pixels))
    if crop == "center":
        old_height, old_width = pixels.shape[-2:]
        old, new = old_width / old_height, width / height
        left = round((old_width - old_width * (new / old)) / 2) if old > new else 0
        top = round((old_height - old_height * (old / new)) / 2) if old < new else 0
        pixels = pixels[..., top : old_height - top, left : old_width - left]
    return F.interpolate(pixels, size=(height, width), mode=method)


def _side(name: str, least: int) -> io.Int.Input:
    return io.Int.Input(name, default=512, min=least, max=MAX_SIZE, tooltip=f"The {name} in pixels.")


class ImageScale(io.ComfyNode):
    """Resizes a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ImageScale",
            display_name="Upscale Image",
            category="image/upscaling",
            description="Resizes a picture. A side of 0 follows the other one.",
            inputs=[
                io.Image.Input("image", tooltip="The picture."),
                io.Combo.Input(
                    "upscale_method", options=METHODS, tooltip="How the pixels of the new size are computed."
                ),
                _side("width", 0),
                _side("height", 0),
                io.Combo.Input("crop", options=CROPS, tooltip="center: cut to the new proportions."),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def validate_inputs(cls, upscale_method=None, crop=None) -> bool | str:
        return only("upscale_method", upscale_method, METHODS) or only("crop", crop, CROPS) or True

    @classmethod
    def execute(cls, image, upscale_method, width, height, crop) -> io.NodeOutput:
        check_picture(image, "image")
        if width == 0 and height == 0:
            return io.NodeOutput(image)
        old_height, old_width = image.shape[1:3]
        width = width or max(1, round(old_width * height / old_height))
        height = height or max(1, round(old_height * width / old_width))
        return io.NodeOutput(scaled(image.movedim(-1, 1), width, height, upscale_method, crop).movedim(1, -1))


class Canny(io.ComfyNode):
    """Finds the edges of a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        threshold: dict[str, Any] = {"min": 0.01, "max": 0.99, "step": 0.01}
        return io.Schema(
            node_id="Canny",
            display_name="Canny",
            category="image/preprocessors",
            description="The edges of a picture, white on black.",
            inputs=[
                io.Image.Input("image", tooltip="The picture."),
                io.Float.Input(
                    "low_threshold", default=0.4, **threshold, tooltip="Weaker contrasts are not edges."
                ),
                io.Float.Input(
                    "high_threshold", default=0.8, **threshold, tooltip="Stronger contrasts always are edges."
                ),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, image, low_threshold, high_threshold) -> io.NodeOutput:
        check_picture(image, "image")
        if not 0 < low_threshold <= high_threshold:
            raise CascadeError(
                f"low_threshold is {low_threshold} and high_threshold {high_threshold}; give the smaller one as low."
            )
        edges = canny_edges(image[..., :3].movedim(-1, 1), low_threshold, high_threshold)
        return io.NodeOutput(edges.float().repeat(1, 3, 1, 1).movedim(1, -1))


class EmptyImage(io.ComfyNode):
    """Makes a picture of one colour."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EmptyImage",
            display_name="EmptyImage",
            category="image",
            description="A picture of one colour.",
            inputs=[
                _side("width", 1),
                _side("height", 1),
                io.Int.Input("batch_size", default=1, **BATCH.input(), tooltip="How many."),
                io.Int.Input(
                    "color", default=0, min=0, max=0xFFFFFF, tooltip="Red, green and blue, a byte each."
                ),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, width, height, batch_size=1, color=0) -> io.NodeOutput:
        check_pixels(width, height, batch_size)
        channels = torch.tensor([color >> shift & 0xFF for shift in (16, 8, 0)], dtype=torch.float32) / 0xFF
        return io.NodeOutput(channels.repeat(batch_size, height, width, 1))


class JoinImageWithAlpha(io.ComfyNode):
    """Adds a mask to a picture as its alpha channel."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="JoinImageWithAlpha",
            display_name="Join Image with Alpha",
            category="mask/compositing",
            description="A picture with a mask as its alpha channel; transparent where the mask is 1.",
            inputs=[
                io.Image.Input("image", tooltip="The picture."),
                io.Mask.Input("alpha", tooltip="The mask, resized to the picture."),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, image, alpha) -> io.NodeOutput:
        check_picture(image, "image")
        check_mask(alpha, "alpha")
        batch = max(len(image), len(alpha))
        alpha = 1.0 - F.interpolate(_planes(alpha), size=image.shape[1:3], mode="bilinear")
        joined = torch.cat([_batch(image[..., :3].movedim(-1, 1), batch), _batch(alpha, batch)], dim=1)
        return io.NodeOutput(joined.movedim(1, -1))


class ImageCompositeMasked(io.ComfyNode):
    """Puts a picture onto another one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        place: dict[str, Any] = {"default": 0, "min": 0, "max": MAX_SIZE}
        return io.Schema(
            node_id="ImageCompositeMasked",
            display_name="ImageCompositeMasked",
            category="image",
            description="Puts the source onto the destination, where the mask is 1.",
            inputs=[
                io.Image.Input("destination", tooltip="The picture below."),
                io.Image.Input("source", tooltip="The picture on it."),
                io.Int.Input("x", **place, tooltip="Position of its left side, in pixels."),
                io.Int.Input("y", **place, tooltip="Position of its upper side, in pixels."),
                io.Boolean.Input(
                    "resize_source", default=False, tooltip="Whether it is resized to the one below."
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Where it covers what is below; by default everywhere."
                ),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, destination, source, x, y, resize_source, mask=None) -> io.NodeOutput:
        check_picture(destination, "destination")
        check_picture(source, "source")
        below = destination.movedim(-1, 1).clone()
        above = _with_channels(source.movedim(-1, 1), below.shape[1])
        if resize_source:
            above = F.interpolate(above, size=below.shape[-2:], mode="bilinear")
        above = _batch(above, len(below))
        if mask is None:
            cover = torch.ones_like(above[:, :1])
        else:
            check_mask(mask, "mask")
            cover = _batch(F.interpolate(_planes(mask), size=above.shape[-2:], mode="bilinear"), len(below))
        place = below[..., y : y + above.shape[-2], x : x + above.shape[-1]]
        height, width = place.shape[-2:]
        above, cover = above[..., :height, :width], cover[..., :height, :width]
        place.copy_(cover * above + (1 - cover) * place)
        return io.NodeOutput(below.movedim(1, -1))


def _planes(mask: Tensor) -> Tensor:
    """A mask as (B, 1, H, W)."""
    return mask.reshape(-1, 1, *mask.shape[-2:]).float()


def _batch(tensor: Tensor, batch: int) -> Tensor:
    """A batch of this many rows; fewer rows are used in turn."""
    rounds = -(-batch // len(tensor))
    return tensor.repeat(rounds, 1, 1, 1)[:batch] if len(tensor) < batch else tensor[:batch]


def _with_channels(pixels: Tensor, channels: int) -> Tensor:
    """Pixels (B, C, H, W) with this number of channels: drops alpha, or adds an opaque one."""
    if pixels.shape[1] >= channels:
        return pixels[:, :channels]
    return F.pad(pixels, (0, 0, 0, 0, 0, channels - pixels.shape[1]), value=1.0)
