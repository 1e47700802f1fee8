"""Conditioning: prompts and image prompts."""

from collections.abc import Mapping
from typing import Any

from ..cascade_core import limits
from ..cascade_core.errors import CascadeError
from ..cascade_core.stages.prompt import check_text
from ..cascade_core.text.foreign_syntax import foreign_syntax
from .api import io, searched_as
from .hosts import host
from .sockets import check_connected, check_finite, check_picture, check_prompts

CATEGORY = "Stable Cascade/conditioning"


def encode_prompts(clip: Any, prompts: Mapping[str, str], node: str) -> list[list]:
    """The CONDITIONING of each socket's prompt. Raises CascadeError for values that are not text, or not a CLIP."""
    if clip is None:
        raise CascadeError("The checkpoint holds no text encoder; connect Load Cascade Text Encoder.")
    check_connected(clip, f"The CLIP of {node}", "Load Cascade Text Encoder")
    for socket, prompt in prompts.items():
        check_text(socket, prompt)
    conditionings = host().encode_texts(clip, list(prompts.values()))
    for socket, encoded in zip(prompts, conditionings, strict=True):
        for states, values in encoded:
            answer = [states, values.get("pooled_output")]
            advice = "lower the weights in the prompt"
            check_finite(answer, clip, f"What the text encoder gives for {socket}", advice)
    return conditionings


class CascadeTextEncode(io.ComfyNode):
    """Encodes both prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CascadeTextEncode",
            display_name="Cascade Text Encode",
            category=CATEGORY,
            description=(
                "Encodes what the picture should and should not show. (word:1.3) weighs a word, \\( is a "
                "bracket."
            ),
            **searched_as(
                "stable cascade, prompt, negative prompt, clip text encode, text to image, txt2img"
            ),
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder."),
                io.String.Input(
                    "positive",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What the picture should show.",
                ),
                io.String.Input(
                    "negative",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What it should not show. May stay empty.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="For both samplers' positive input."),
                io.Conditioning.Output(display_name="negative", tooltip="For both samplers' negative input."),
            ],
        )

    @classmethod
    def execute(cls, clip, positive, negative) -> io.NodeOutput:
        encoded = encode_prompts(clip, {"positive": positive, "negative": negative}, "Cascade Text Encode")
        pieces = [(kind, text[:60]) for kind, text in foreign_syntax(f"{positive}\n{negative}")]
        return io.NodeOutput(*encoded, **({"ui": {"cascade_syntax": pieces}} if pieces else {}))


class CascadeImagePrompt(io.ComfyNode):
    """Adds a picture to a prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CascadeImagePrompt",
            display_name="Cascade Image Prompt",
            category=CATEGORY,
            description="Adds a picture to a prompt: Stage C makes variations of what it shows.",
            **searched_as("stable cascade, image variation, remix, unclip, clip vision, reference image"),
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The prompt that the picture is added to."),
                io.ClipVision.Input("clip_vision", tooltip="The image encoder."),
                io.Image.Input("image", tooltip="The picture; if there are several, each is added."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    **limits.STRENGTH.input(),
                    step=0.01,
                    tooltip="How much the picture counts. 0 adds nothing.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="conditioning", tooltip="The prompt with the picture.")
            ],
        )

    @classmethod
    def execute(cls, conditioning, clip_vision, image, strength) -> io.NodeOutput:
        check_prompts(conditioning, "conditioning")
        if strength == 0:
            return io.NodeOutput(conditioning)
        if clip_vision is None:
            raise CascadeError("The checkpoint holds no image encoder; connect Load Cascade Image Encoder.")
        check_connected(clip_vision, "The CLIP_VISION of Cascade Image Prompt", "Load Cascade Image Encoder")
        check_picture(image, "image")
        encoded = host().encode_image(clip_vision, image)
        check_finite([encoded.image_embeds], clip_vision, "What the image encoder gives")
        prompt = {
            "clip_vision_output": encoded,
            "strength": strength,
            "noise_augmentation": 0.0,
        }
        return io.NodeOutput(
            [
                [tokens, {**values, "unclip_conditioning": [*values.get("unclip_conditioning", []), prompt]}]
                for tokens, values in conditioning
            ]
        )
