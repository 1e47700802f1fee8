"""ComfyUI's KSampler as its examples for Stable Cascade set it: `euler_ancestral` over the `simple` scheduler.

ComfyUI works with x / a, noised by σ = b / a, and Euler's ancestral step there (eta 1) is the DDPM step here: with
σ_down = σ'² / σ, a'·σ_up is DDPM's deviation. So the core's sampler runs over ComfyUI's levels with ComfyUI's noise,
and only rounding differs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...cascade_core import limits
from ...cascade_core.diffusion.noise import SEED_RANGE, NoiseSource
from ...cascade_core.diffusion.schedule import COSINE_OFFSET, VARIANCE_RANGE, alpha_sigma, at_least_float32
from ...cascade_core.errors import CascadeError
from ...cascade_core.run import SamplingRun
from ...nodes.api import io
from ...nodes.hosts import host
from ...nodes.hosts.run import NetworkDescription, SamplingRequest
from ...nodes.sockets import (
    check_conditioning,
    check_connected,
    check_finite,
    check_latent,
    check_min_side,
    with_values,
    without_values,
)
from .elsewhere import ELSEWHERE, only

SAMPLERS = ["euler_ancestral"]
SCHEDULERS = ["simple"]
SHIFTS = {"stage_c": 2.0, "stage_b": 1.0}  # of ComfyUI's models
TIMES = 10_000  # entries of ComfyUI's table of noise levels


def sigma(time: float, shift: float) -> Tensor:
    """ComfyUI's noise level σ = b / a at a time in (0, 1], in float32 as there; clamped only at its end."""
    s = torch.tensor(COSINE_OFFSET)
    variance = (
        torch.cos((time + s) / (1 + s) * torch.pi * 0.5) ** 2 / torch.cos(s / (1 + s) * torch.pi * 0.5) ** 2
    )
    if shift != 1:
        variance = ((variance / (1 - variance)).log() + 2 * torch.log(1.0 / torch.tensor(shift))).sigmoid()
    variance = variance.clamp(*VARIANCE_RANGE)
    return ((1 - variance) / variance) ** 0.5


def simple_sigmas(steps: int, shift: float, denoise: float = 1.0) -> Tensor:
    """(steps + 1,), the levels of the `simple` scheduler: evenly spaced in the table, then zero.

    For a denoise below 1, they are the last levels of a longer schedule.
    """
    total = int(steps / denoise) if denoise <= 0.9999 else steps
    stride = TIMES / total
    times = [(TIMES - int(step * stride)) / TIMES for step in range(total - steps, total)]
    return torch.stack([*(sigma(time, shift) for time in times), torch.zeros(())])


class KSamplerNoise(NoiseSource):
    """ComfyUI's noise, drawn for the whole batch at once; later noise on the device, on the CPU from the next seed."""

    def __init__(self, run: SamplingRun):
        self.run = run
        self.first = self._generator("cpu", run.seed)
        device = run.latent.device
        self.later = self._generator(device, run.seed + (device.type == "cpu"))
        self.begun = False

    @staticmethod
    def _generator(device: torch.device | str, seed: int) -> torch.Generator:
        return torch.Generator(device).manual_seed(seed % SEED_RANGE)

    def draw(self) -> Tensor:
        shape = tuple(self.run.latent.shape)
        if self.begun:
            return torch.randn(shape, generator=self.later, device=self.later.device)
        self.begun = True
        indices = self.run.batch_index
        if indices is None:
            return torch.randn(shape, generator=self.first)
        drawn = [torch.randn(1, *shape[1:], generator=self.first) for _ in range(max(indices) + 1)]
        return torch.cat([drawn[index] for index in indices])


class KSamplerRun(SamplingRun):
    """A run over ComfyUI's levels with its noise."""

    def log_snrs(self) -> Tensor:
        return -2 * simple_sigmas(self.steps, self.shift, self.denoise).log()  # infinite where the noise ends

    def noise(self) -> NoiseSource:
        return KSamplerNoise(self)

    def start(self, noise: Tensor) -> Tensor:
        """Noises the start; at the highest level the noise comes in at full strength, as in the core."""
        level = simple_sigmas(self.steps, self.shift, self.denoise)[0]
        highest = sigma(1.0, self.shift)
        a, b = alpha_sigma(-2 * level.log())
        latent = at_least_float32(self.latent)
        whole = level > highest or math.isclose(level, highest, rel_tol=1e-5)
        return latent * a + noise.to(latent) * (1 if whole else b)


class KSampler(io.ComfyNode):
    """Samples Stage C or Stage B as ComfyUI does."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KSampler",
            display_name="KSampler",
            category="sampling",
            description="Samples Stage C or Stage B as ComfyUI does, by euler_ancestral over the simple scheduler.",
            inputs=[
                io.Model.Input("model", tooltip="Stage C or Stage B."),
                io.Int.Input(
                    "seed",
                    default=0,
                    **limits.SEED.input(),
                    control_after_generate=True,
                    tooltip="Seed of the whole batch's noise.",
                ),
                io.Int.Input(
                    "steps",
                    default=20,
                    **limits.STEPS.input(),
                    tooltip="Steps of sampling.",
                ),
                io.Float.Input(
                    "cfg",
                    default=8.0,
                    **limits.CFG.input(),
                    step=0.1,
                    round=0.01,
                    tooltip="How strongly the prompt pulls. 1 leaves the negative prompt out.",
                ),
                io.Combo.Input("sampler_name", options=SAMPLERS, tooltip="Others run with --server."),
                io.Combo.Input("scheduler", options=SCHEDULERS, tooltip="Others run with --server."),
                io.Conditioning.Input("positive", tooltip="What the picture should show."),
                io.Conditioning.Input("negative", tooltip="What it should not show."),
                io.Latent.Input("latent_image", tooltip="The latent to start from."),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    **limits.DENOISE.input(),
                    step=0.01,
                    tooltip="The share of the schedule that is run: below 1 the given latent is partly kept.",
                ),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def validate_inputs(cls, sampler_name=None, scheduler=None) -> bool | str:
        wrong = only("sampler_name", sampler_name, SAMPLERS) or only("scheduler", scheduler, SCHEDULERS)
        return wrong or True

    @classmethod
    def execute(
        cls, model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise=1.0
    ) -> io.NodeOutput:
        network = _network(model)
        check_latent(latent_image, network, "latent_image", "an empty latent, or one of a picture")
        if network.kind == "stage_b":
            check_min_side(latent_image, network)
        for socket, prompt in (("positive", positive), ("negative", negative)):
            check_conditioning(prompt, network, socket)
        if denoise == 0:
            return io.NodeOutput(dict(latent_image))
        positive, negative = _prompts(network, positive, negative)
        run = KSamplerRun(
            latent_image["samples"],
            seed,
            steps,
            SHIFTS[str(network.kind)],
            "ddpm",
            denoise,
            latent_image.get("noise_mask"),
            latent_image.get("batch_index"),
        )
        request = SamplingRequest(str(network.kind), model, positive, negative, run, cfg, cfg_rescale=0.0)
        latent = host().sample(request).latent
        advice = "lower cfg and the weights in the prompt"
        check_finite([latent], model, f"The latent that {network.name} sampled", advice)
        return io.NodeOutput({**latent_image, "samples": latent})


def _network(model: Any) -> NetworkDescription:
    check_connected(model, "The MODEL of KSampler", "a loader")
    network = host().describe_network(model)
    if network.kind not in SHIFTS:
        raise CascadeError(
            f"The MODEL of KSampler is {network.name}, but Stage C or B is expected; {ELSEWHERE}."
        )
    return network


def _prompts(network: NetworkDescription, positive: list, negative: list) -> tuple[list, list]:
    """Both prompts as ComfyUI's models take them: Stage B's without ControlNets, a missing latent as zeros."""
    if network.kind == "stage_b":
        positive, negative = (without_values(prompt, "control") for prompt in (positive, negative))
        latents = [values.get("stable_cascade_prior") for _, values in [*positive, *negative]]
        like = next((latent for latent in latents if latent is not None), torch.zeros(1, 16, 1, 1))
        positive, negative = (
            [
                [states, {"stable_cascade_prior": torch.zeros_like(like), **values}]
                for states, values in prompt
            ]
            for prompt in (positive, negative)
        )
        return positive, negative
    shared = [values["control"] for _, values in positive if values.get("control_apply_to_uncond")]
    if shared and not any("control" in values for _, values in negative):
        negative = with_values(negative, control=shared[0])
    return positive, negative
