"""ComfyUI's nodes for prompts, image prompts and ControlNets."""

from __future__ import annotations

from typing import Any

from ...cascade_core import limits
from ...cascade_core.errors import CascadeError
from ...nodes.api import io
from ...nodes.conditioning import encode_prompts
from ...nodes.control import CascadeControlNetApply
from ...nodes.hosts import host
from ...nodes.sockets import (
    check_connected,
    check_finite,
    check_picture,
    check_prompts,
    latent_shape,
    with_values,
)
from .elsewhere import only

CATEGORY = "conditioning"


class CLIPTextEncode(io.ComfyNode):
    """Encodes a prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CLIPTextEncode",
            display_name="CLIP Text Encode (Prompt)",
            category=CATEGORY,
            description="Encodes a prompt. (word:1.3) weighs a word.",
            inputs=[
                io.String.Input("text", multiline=True, dynamic_prompts=True, tooltip="The prompt."),
                io.Clip.Input("clip", tooltip="The text encoder."),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, clip, text) -> io.NodeOutput:
        return io.NodeOutput(*encode_prompts(clip, {"text": text}, "CLIP Text Encode"))


class CLIPVisionEncode(io.ComfyNode):
    """Encodes a picture for a prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CLIPVisionEncode",
            display_name="CLIP Vision Encode",
            category=CATEGORY,
            description="Encodes a picture for unCLIPConditioning.",
            inputs=[
                io.ClipVision.Input("clip_vision", tooltip="The image encoder."),
                io.Image.Input("image", tooltip="The picture."),
                # Newer than the examples, which lack it.
                io.Combo.Input(
                    "crop", options=["center"], default="center", optional=True, tooltip="Its middle."
                ),
            ],
            outputs=[io.ClipVisionOutput.Output()],
        )

    @classmethod
    def validate_inputs(cls, crop=None) -> bool | str:
        return only("crop", crop, ["center"]) or True

    @classmethod
    def execute(cls, clip_vision, image, crop="center") -> io.NodeOutput:
        if clip_vision is None:
            raise CascadeError(
                "The checkpoint holds no image encoder; load one that does with unCLIPCheckpointLoader."
            )
        check_connected(clip_vision, "The CLIP_VISION of CLIP Vision Encode", "unCLIPCheckpointLoader")
        check_picture(image, "image")
        encoded = host().encode_image(clip_vision, image)
        check_finite([encoded.image_embeds], clip_vision, "What the image encoder gives")
        return io.NodeOutput(encoded)


class UnCLIPConditioning(io.ComfyNode):
    """Adds an encoded picture to a prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="unCLIPConditioning",
            display_name="unCLIPConditioning",
            category=CATEGORY,
            description="Adds an encoded picture to a prompt: Stage C makes variations of what it shows.",
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The prompt that the picture is added to."),
                io.ClipVisionOutput.Input("clip_vision_output", tooltip="The encoded picture."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    **limits.STRENGTH.input(),
                    step=0.01,
                    tooltip="How much the picture counts. 0 adds nothing.",
                ),
                io.Float.Input(
                    "noise_augmentation",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Has no effect on Stable Cascade.",
                ),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, conditioning, clip_vision_output, strength, noise_augmentation) -> io.NodeOutput:
        check_prompts(conditioning, "conditioning")
        check_connected(clip_vision_output, "clip_vision_output of unCLIPConditioning", "CLIP Vision Encode")
        if strength == 0:
            return io.NodeOutput(conditioning)
        picture = {
            "clip_vision_output": clip_vision_output,
            "strength": strength,
            "noise_augmentation": noise_augmentation,
        }
        return io.NodeOutput(
            [
                [states, {**values, "unclip_conditioning": [*values.get("unclip_conditioning", []), picture]}]
                for states, values in conditioning
            ]
        )


def _strength_input() -> io.Float.Input:
    return io.Float.Input(
        "strength",
        default=1.0,
        **limits.CONTROL_STRENGTH.input(),
        step=0.01,
        tooltip="How closely the hint is followed.",
    )


class ControlNetApply(io.ComfyNode):
    """Adds a ControlNet to a prompt, and thereby to the negative one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ControlNetApply",
            display_name="Apply ControlNet (OLD)",
            category=CATEGORY,
            description="Adds a ControlNet to a prompt; a sampler applies it to the negative prompt as well.",
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The prompt."),
                io.ControlNet.Input("control_net", tooltip="The ControlNet."),
                io.Image.Input("image", tooltip="The hint."),
                _strength_input(),
            ],
            outputs=[io.Conditioning.Output()],
            is_deprecated=True,
        )

    @classmethod
    def execute(cls, conditioning, control_net, image, strength) -> io.NodeOutput:
        applied = CascadeControlNetApply.execute(conditioning, [], control_net, image, strength, 0.0, 1.0)
        return io.NodeOutput(
            with_values(applied[0], control_apply_to_uncond=True) if strength else conditioning
        )


class ControlNetApplyAdvanced(io.ComfyNode):
    """Adds a ControlNet to both prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        share: dict[str, Any] = {**limits.SHARE.input(), "step": 0.001}
        return io.Schema(
            node_id="ControlNetApplyAdvanced",
            display_name="Apply ControlNet",
            category=CATEGORY,
            description="Adds a ControlNet to both prompts.",
            inputs=[
                io.Conditioning.Input("positive", tooltip="What the picture should show."),
                io.Conditioning.Input("negative", tooltip="What it should not show."),
                io.ControlNet.Input("control_net", tooltip="The ControlNet."),
                io.Image.Input("image", tooltip="The hint."),
                _strength_input(),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    **share,
                    tooltip="The share of the steps at which it begins.",
                ),
                io.Float.Input(
                    "end_percent", default=1.0, **share, tooltip="The share of the steps at which it ends."
                ),
                io.Vae.Input("vae", optional=True, tooltip="Stable Cascade's ControlNets do not use it."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
            ],
        )

    @classmethod
    def execute(
        cls, positive, negative, control_net, image, strength, start_percent, end_percent, vae=None
    ) -> io.NodeOutput:
        return CascadeControlNetApply.execute(
            positive, negative, control_net, image, strength, start_percent, end_percent
        )


class StableCascadeStageBConditioning(io.ComfyNode):
    """Gives Stage B the latent that Stage C made."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StableCascade_StageB_Conditioning",
            display_name="StableCascade_StageB_Conditioning",
            category="conditioning/stable_cascade",
            description="Adds the latent that Stage C made to a prompt, for Stage B.",
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The prompt."),
                io.Latent.Input("stage_c", tooltip="The latent that Stage C made."),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, conditioning, stage_c) -> io.NodeOutput:
        check_prompts(conditioning, "conditioning")
        latent_shape(stage_c, "stage_c")
        return io.NodeOutput(with_values(conditioning, stable_cascade_prior=stage_c["samples"]))
