"""Nodes that give ComfyUI's own samplers the published schedule and guidance."""

import torch

from ..cascade_core import limits
from ..cascade_core.diffusion.samplers import log_snr_range
from ..cascade_core.errors import CascadeError
from .api import io, searched_as
from .hosts import host
from .sockets import check_connected

CATEGORY = "Stable Cascade/sampling"


class CascadeScheduler(io.ComfyNode):
    """Makes SIGMAS of the published noise levels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CascadeScheduler",
            display_name="Cascade Scheduler",
            category=CATEGORY,
            description="The published schedule as sigmas, for Sampler Custom Advanced.",
            **searched_as("stable cascade, sigmas, steps"),
            inputs=[
                io.Int.Input(
                    "steps",
                    default=20,
                    **limits.STEPS.input(),
                    tooltip="Steps of sampling.",
                ),
                io.Float.Input(
                    "shift",
                    default=2.0,
                    **limits.SHIFT.input(),
                    step=0.05,
                    tooltip="Above 1 spends more of the steps on high noise. Published: 2 for Stage C, 1 for Stage B.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="The share of the schedule that is run: below 1 the given latent is partly kept.",
                ),
                io.Boolean.Input(
                    "end_at_zero",
                    default=True,
                    tooltip=(
                        "Ends without any noise, as ComfyUI's samplers expect. The published schedule ends just "
                        "above zero."
                    ),
                ),
            ],
            outputs=[io.Sigmas.Output(display_name="SIGMAS", tooltip="For Sampler Custom Advanced.")],
        )

    @classmethod
    def execute(cls, steps, shift, denoise, end_at_zero) -> io.NodeOutput:
        if steps < 1 or not shift > 0 or not 0 < denoise <= 1:
            raise CascadeError(
                f"steps {steps}, shift {shift} and denoise {denoise} make no schedule; give at least one step, a "
                "shift above 0, and a denoise above 0 and up to 1."
            )
        sigmas = (log_snr_range(steps, shift, denoise) / -2).exp()  # (steps + 1,)
        if end_at_zero:
            sigmas = torch.cat([sigmas[:-1], sigmas.new_zeros(1)])
        return io.NodeOutput(sigmas)


class CascadeGuidance(io.ComfyNode):
    """Sets the published guidance and schedule in a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CascadeGuidance",
            display_name="Cascade Guidance",
            category=CATEGORY,
            description="Gives ComfyUI's own samplers the published guidance with its rescale, and a shift.",
            **searched_as("stable cascade, cfg, rescale cfg, model sampling, shift"),
            inputs=[
                io.Model.Input("model", tooltip="Stage B or C."),
                io.Float.Input(
                    "cfg_rescale",
                    default=0.7,
                    **limits.CFG_RESCALE.input(),
                    step=0.05,
                    tooltip="Brings the contrast that guidance raises back to the prompt's own: 0 not at all, 1 fully.",
                ),
                io.Float.Input(
                    "shift",
                    default=2.0,
                    **limits.SHIFT.input(),
                    step=0.05,
                    tooltip="The shift of ComfyUI's schedulers. Published: 2 for Stage C, 1 for Stage B.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="For KSampler and other samplers.")],
        )

    @classmethod
    def execute(cls, model, cfg_rescale, shift) -> io.NodeOutput:
        check_connected(model, "The MODEL of Cascade Guidance", "Load Stage C or Load Stage B")
        network = host().describe_network(model)
        if network.kind is None:
            raise CascadeError(
                f"The MODEL connected to Cascade Guidance is {network.name}, but Stage B or C is expected; connect "
                "Load Stage C or Load Stage B."
            )
        return io.NodeOutput(host().with_guidance(model, cfg_rescale, shift))
