"""Outpainting's padding before sampling, and compositing with the source after inpainting."""

from typing import Any

from ..cascade_core import limits
from ..cascade_core.errors import CascadeError
from ..cascade_core.geometry import MAX_SIZE, check_pixels
from ..cascade_core.hints.masks import composite, expand
from .api import io, searched_as
from .sockets import check_mask, check_picture

CATEGORY = "Stable Cascade/inpainting"


class CascadeOutpaint(io.ComfyNode):
    """Pads a picture for outpainting."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        def side(name: str, default: int) -> Any:
            return io.Int.Input(
                name, default=default, min=0, max=MAX_SIZE, step=8, tooltip=f"Pixels to add at the {name}."
            )

        return io.Schema(
            node_id="CascadeOutpaint",
            display_name="Cascade Outpaint",
            category=CATEGORY,
            description="Adds room around a picture, and gives the mask of that room; the rest is as for inpainting.",
            **searched_as("stable cascade, pad image for outpainting, extend, size, mask"),
            inputs=[
                io.Image.Input("image", tooltip="The picture to go beyond."),
                side("left", 128),
                side("top", 0),
                side("right", 128),
                side("bottom", 0),
                io.Int.Input(
                    "feather",
                    default=32,
                    min=0,
                    max=MAX_SIZE,
                    tooltip="Pixels, from the old edge inwards, over which the picture blends into what is painted.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image", tooltip="The larger picture; its border pixels fill the room."
                ),
                io.Mask.Output(
                    display_name="mask", tooltip="The new part, for inpainting: 1 where it is to be painted."
                ),
            ],
        )

    @classmethod
    def execute(cls, image, left, top, right, bottom, feather) -> io.NodeOutput:
        check_picture(image, "image")
        height, width = image.shape[1] + top + bottom, image.shape[2] + left + right
        if max(height, width) > MAX_SIZE:
            raise CascadeError(
                f"The picture would have {width} × {height} pixels, but no side may exceed {MAX_SIZE}; add less."
            )
        check_pixels(width, height, len(image))
        padded, mask = expand(image[..., :3].movedim(-1, 1), left, top, right, bottom, feather)
        return io.NodeOutput(padded.movedim(1, -1), mask.repeat(len(image), 1, 1))


class CascadeInpaintComposite(io.ComfyNode):
    """Composites the painted picture into the source."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CascadeInpaintComposite",
            display_name="Cascade Inpaint Composite",
            category=CATEGORY,
            description=(
                "Puts what was painted into the source. Outside the mask the source stays as it was, bit for bit."
            ),
            **searched_as("stable cascade, inpaint, mask, paste, blend"),
            inputs=[
                io.Image.Input("image", tooltip="The painted picture, from Cascade Decode."),
                io.Image.Input("source", tooltip="The picture that was painted in; the result has its size."),
                io.Mask.Input("mask", tooltip="The mask that was painted in."),
                io.Int.Input(
                    "feather",
                    default=8,
                    **limits.FEATHER.input(),
                    tooltip=(
                        "Pixels, from the mask's edge inwards, over which the source blends into what was painted. "
                        "Keep it well under half of the mask's width."
                    ),
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The picture, of the source's size.")],
        )

    @classmethod
    def execute(cls, image, source, mask, feather) -> io.NodeOutput:
        check_picture(image, "image")
        check_picture(source, "source")
        check_mask(mask, "mask")
        if not 0 <= feather <= limits.FEATHER.most:
            raise CascadeError(
                f"feather is {feather}; it must lie within 0 and {limits.FEATHER.most} pixels."
            )
        result, before = (picture[..., :3].movedim(-1, 1) for picture in (image, source))
        return io.NodeOutput(composite(result, before, mask, feather).movedim(1, -1))
