"""A sampling run without ComfyUI: one prompt on each socket, sampled by a stage of the core."""

from typing import Any

from ....cascade_core.diffusion.samplers import SamplerStep
from ....cascade_core.errors import CascadeError
from ....cascade_core.run import SamplingResult
from ....cascade_core.stages.diffusion import Guidance
from ....cascade_core.stages.prompt import PicturePrompt, Prompt
from ..reporting import report
from ..run import SamplingRequest


def sample(request: SamplingRequest) -> SamplingResult:
    positive = prompt_of(request.positive, "positive")
    negative = prompt_of(request.negative, "negative")
    return request.model.sample(
        request.run,
        positive,
        negative,
        Guidance(request.cfg, request.cfg_rescale),
        request.tile_positions,
        request.engine,
        _report_step,
    )


def prompt_of(conditioning: list, socket: str) -> Prompt:
    """The single prompt of a CONDITIONING."""
    if len(conditioning) != 1:
        raise CascadeError(
            f"{socket} holds {len(conditioning)} prompts, but exactly one can be sampled outside ComfyUI; "
            "connect one Cascade Text Encode."
        )
    states, values = conditioning[0]
    pictures = values.get("unclip_conditioning") or []
    return Prompt(
        states,
        values["pooled_output"],
        tuple(
            PicturePrompt(picture["clip_vision_output"].image_embeds, picture["strength"])
            for picture in pictures
        ),
        values.get("control", ()),
        values.get("stable_cascade_prior"),
    )


def with_guidance(model: Any, cfg_rescale: float, shift: float) -> Any:
    raise CascadeError(
        "Cascade Guidance is for ComfyUI's own samplers, which are not here; connect the MODEL to Cascade Prior "
        "Sampler or Cascade Decoder Sampler, which have cfg_rescale and shift themselves."
    )


def _report_step(step: SamplerStep) -> None:
    report(step.index + 1, step.steps)
