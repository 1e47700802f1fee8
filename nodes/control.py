"""ControlNets, and the hints that they take."""

import torch
from torch import Tensor

from ..cascade_core import limits
from ..cascade_core.errors import CascadeError, quoted
from ..cascade_core.geometry import check_pixels, stage_c_size, whole_size
from ..cascade_core.hints.canny import canny_hint
from ..cascade_core.hints.control import check_hint
from ..cascade_core.hints.filters import (
    READS,
    identity_map,
    inpaint_hint,
    super_resolution_hint,
    super_resolution_input,
)
from ..cascade_core.hints.kinds import KINDS
from .api import io, searched_as
from .faces import find_faces
from .hosts import host
from .sizes import compression_input, empty_stage_b, empty_stage_c, picture_report
from .sockets import check_connected, check_finite, check_mask, check_picture, check_prompts, check_vae

CATEGORY = "Stable Cascade/ControlNet"
NO_CONTROLNET = "Cascade ControlNet Apply got no CONTROL_NET; connect Load Cascade ControlNet."


class CascadeControlNetApply(io.ComfyNode):
    """Applies a ControlNet with its hint to the prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CascadeControlNetApply",
            display_name="Cascade ControlNet Apply",
            category=CATEGORY,
            description=(
                "Lets a ControlNet steer Stage C by a hint, such as the edges of a picture. Several of "
                "these in a row work together; Stage B is not affected."
            ),
            **searched_as("stable cascade, apply controlnet"),
            inputs=[
                io.Conditioning.Input("positive", tooltip="What the picture should show."),
                io.Conditioning.Input("negative", tooltip="What it should not show."),
                io.ControlNet.Input("control_net", tooltip="From Load Cascade ControlNet."),
                io.Image.Input(
                    "image",
                    tooltip=(
                        "The kind of hint that this ControlNet was trained on, such as Cascade Canny's edges; several "
                        "go to the pictures of a batch in turn."
                    ),
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    **limits.CONTROL_STRENGTH.input(),
                    step=0.01,
                    tooltip="How strongly the hint pulls. 0 is as if this node were not there.",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    **limits.SHARE.input(),
                    step=0.001,
                    tooltip=(
                        "The share of the steps at which it begins: 0 is the first step, where the composition forms."
                    ),
                ),
                io.Float.Input(
                    "end",
                    default=1.0,
                    **limits.SHARE.input(),
                    step=0.001,
                    tooltip="The share of the steps at which it ends. Below 1 the last details are left to the prompt.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="For Cascade Prior Sampler."),
                io.Conditioning.Output(display_name="negative", tooltip="For Cascade Prior Sampler."),
            ],
        )

    @classmethod
    def execute(cls, positive, negative, control_net, image, strength, start, end) -> io.NodeOutput:
        check_prompts(positive, "positive")
        check_prompts(negative, "negative")
        if strength == 0:
            return io.NodeOutput(positive, negative)
        if control_net is None:
            raise CascadeError(NO_CONTROLNET)
        check_connected(control_net, "The CONTROL_NET of Cascade ControlNet Apply", "Load Cascade ControlNet")
        control = host().describe_controlnet(control_net)
        if not control.cascade:
            raise CascadeError(
                f"The CONTROL_NET connected to Cascade ControlNet Apply is {control.name}, which is for another model; "
                "connect Load Cascade ControlNet."
            )
        if not 0 <= start <= end <= 1:
            raise CascadeError(f"start is {start} and end {end}, but must be 0 <= start <= end <= 1.")
        check_picture(image, "image")
        if control.config is not None:
            check_hint(control.config, control.name, image.shape[-1])
        return io.NodeOutput(
            *host().apply_controlnet(positive, negative, control_net, image, strength, start, end)
        )


class CascadeCanny(io.ComfyNode):
    """Edges for the canny ControlNet."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CascadeCanny",
            display_name=KINDS["canny"].node,
            category=CATEGORY,
            description="The edges of a picture, as the published canny ControlNet was trained on them.",
            **searched_as("stable cascade, edges, line art, controlnet preprocessor"),
            inputs=[
                io.Image.Input("image", tooltip="The picture whose edges are to be followed."),
                io.Int.Input(
                    "low",
                    default=100,
                    **limits.CANNY.input(),
                    tooltip="Contrasts weaker than this are not edges. Lower finds more edges.",
                ),
                io.Int.Input(
                    "high",
                    default=200,
                    **limits.CANNY.input(),
                    tooltip="Contrasts stronger than this always are edges; those in between only where they join one.",
                ),
                io.Int.Input(
                    "size",
                    default=224,
                    min=32,
                    max=2048,
                    step=8,
                    tooltip=(
                        "Side in pixels of the square in which edges are looked for: larger finds finer ones. The "
                        "published ControlNet was trained on 224."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="hint", tooltip="For Cascade ControlNet Apply: white edges on black."
                )
            ],
        )

    @classmethod
    def execute(cls, image, low, high, size) -> io.NodeOutput:
        check_picture(image, "image")
        edges = canny_hint(image[..., :3].movedim(-1, 1), low, high, size)  # (B, 1, H, W)
        return io.NodeOutput(edges.movedim(1, -1).repeat(1, 1, 1, 3))


class CascadeInpaintHint(io.ComfyNode):
    """Makes the inpainting ControlNet's hint from a picture and a mask."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CascadeInpaintHint",
            display_name=KINDS["inpainting"].node,
            category=CATEGORY,
            description="A picture with its masked part white, and the mask, for the inpainting ControlNet.",
            **searched_as("stable cascade, inpaint, mask, controlnet preprocessor"),
            inputs=[
                io.Image.Input("image", tooltip="The picture to paint in."),
                io.Mask.Input("mask", tooltip="1 where the picture is painted anew."),
                io.Float.Input(
                    "threshold",
                    default=0.5,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    tooltip="Where the mask is above this, the ControlNet sees nothing of the picture.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="hint",
                    tooltip="For Cascade ControlNet Apply: four channels, the picture and the mask.",
                )
            ],
        )

    @classmethod
    def execute(cls, image, mask, threshold) -> io.NodeOutput:
        check_picture(image, "image")
        check_mask(mask, "mask")
        return io.NodeOutput(inpaint_hint(image[..., :3].movedim(-1, 1), mask, threshold).movedim(1, -1))


class CascadeSuperResolutionHint(io.ComfyNode):
    """Makes the super-resolution ControlNet's hint from a small picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CascadeSuperResolutionHint",
            display_name=KINDS["super_resolution"].node,
            category=CATEGORY,
            description=(
                "A small picture as the super-resolution ControlNet reads it, and the empty latents of the large one."
            ),
            **searched_as("stable cascade, upscale, super resolution, controlnet preprocessor"),
            inputs=[
                io.Vae.Input("vae", tooltip="The semantic compressor, from Load Cascade Compressor."),
                io.Image.Input("image", tooltip="The small picture."),
                io.Float.Input(
                    "scale",
                    default=2.0,
                    min=1.0,
                    max=16.0,
                    step=0.1,
                    tooltip=(
                        "How many times wider and higher the picture becomes. The published ControlNet was trained "
                        "on 2."
                    ),
                ),
                compression_input(),
                io.Combo.Input(
                    "reads",
                    options=list(READS),
                    default=READS[0],
                    optional=True,
                    tooltip=(
                        "What the ControlNet was trained to read: the small picture, as the published one, or the "
                        "same enlarged, as the demo's."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="hint",
                    tooltip="For Cascade ControlNet Apply: 16 channels, not a picture to look at.",
                ),
                io.Latent.Output(display_name="stage_c", tooltip="For Cascade Prior Sampler, empty."),
                io.Latent.Output(display_name="stage_b", tooltip="For Cascade Decoder Sampler, empty."),
            ],
        )

    @classmethod
    def execute(cls, vae, image, scale, compression, reads="small") -> io.NodeOutput:
        check_vae(vae, "compressor", KINDS["super_resolution"].node, "Load Cascade Compressor")
        check_picture(image, "image")
        if not 1 <= scale <= 16:
            raise CascadeError(f"scale is {scale}; it must lie within 1 and 16 (2 is usual).")
        if reads not in READS:
            raise CascadeError(f"reads is {quoted(reads)}; choose {' or '.join(READS)}.")
        batch, *sides = image.shape[:3]
        height, width = whole_size(*(round(side * scale) for side in sides))
        check_pixels(width, height, batch)
        size = stage_c_size(height, width, compression)
        small = super_resolution_input(image, size, scale if reads == "small" else 1)

        def compress(pictures: Tensor) -> Tensor:
            return host().encode_pixels(vae, pictures.movedim(1, -1))

        hint = super_resolution_hint(compress, small, size)
        check_finite([hint], vae, "The compressor's latent")
        return io.NodeOutput(
            hint.movedim(1, -1),
            empty_stage_c(batch, height, width, compression),
            empty_stage_b(batch, height, width),
            ui=picture_report(image),
        )


class CascadeIdentityHint(io.ComfyNode):
    """Makes the identity ControlNet's hint from faces."""

    PLACES = ("where it is", "everywhere")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CascadeIdentityHint",
            display_name=KINDS["identity"].node,
            category=CATEGORY,
            description=(
                "Tells an identity ControlNet whose face is where in a picture. Needs the package insightface and its "
                "two networks."
            ),
            **searched_as("stable cascade, face, portrait, controlnet preprocessor"),
            inputs=[
                io.Image.Input("image", tooltip="A picture of a face, or of several."),
                io.Combo.Input(
                    "place",
                    options=list(cls.PLACES),
                    default=cls.PLACES[0],
                    tooltip="Where the face may appear: where it is in this picture, or, with a single face, anywhere.",
                ),
                io.Int.Input(
                    "faces",
                    default=4,
                    min=1,
                    max=16,
                    tooltip="How many faces are taken at most: large ones near the middle first.",
                ),
                compression_input(),
            ],
            outputs=[
                io.Image.Output(
                    display_name="hint",
                    tooltip="For Cascade ControlNet Apply: 512 channels, not a picture to look at.",
                )
            ],
        )

    @classmethod
    def execute(cls, image, place, faces, compression) -> io.NodeOutput:
        if place not in cls.PLACES:
            raise CascadeError(f"place is {quoted(place)}; choose one of {', '.join(cls.PLACES)}.")
        check_picture(image, "image")
        height, width = image.shape[1:3]
        size = stage_c_size(height, width, compression)
        maps = []
        for index, picture_faces in enumerate(find_faces(image[..., :3], faces)):
            if not len(picture_faces.boxes):
                raise CascadeError(
                    f"No face was found in picture {index}; choose one that shows a face clearly."
                )
            boxes = picture_faces.boxes
            if place == "everywhere":
                if len(boxes) > 1:
                    raise CascadeError(
                        f"Picture {index} shows {len(boxes)} faces, but only one can be everywhere; set faces to 1."
                    )
                boxes = torch.tensor([[0.0, 0.0, width, height]])
            maps.append(identity_map(picture_faces.embeddings, boxes, (height, width), size))
        return io.NodeOutput(torch.cat(maps).movedim(1, -1))
