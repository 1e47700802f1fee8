# pyright: reportMissingImports=false
"""A sampling run inside ComfyUI's guider: our guidance and samplers; areas, hooks, LoRA and memory are its.

The host works with x / a, noised by sigma = b / a = exp(-log_snr / 2), and predicts the clean latent; our
samplers work with a·x0 + b·epsilon and predict epsilon.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import Any

import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import torch
from torch import Tensor

from ....cascade_core.diffusion.guidance import guide
from ....cascade_core.diffusion.samplers import SamplerStep
from ....cascade_core.diffusion.schedule import alpha_sigma, per_image
from ....cascade_core.run import SamplingResult, SamplingRun, Stopwatch
from ....cascade_core.run import sample as sample_run
from ..run import SamplingRequest
from .conditions import keep_on_device, new_schedule
from .model import ENGINE, NOISE
from .progress import step_callback
from .tiling import in_tiles


class CascadeGuider(comfy.samplers.CFGGuider):
    """The host's guider with the published guidance, which brings the contrast back per image."""

    def __init__(self, patcher: Any, cfg: float, cfg_rescale: float):
        super().__init__(patcher)
        self.set_cfg(cfg)
        self.cfg_rescale = cfg_rescale

    def predict_noise(self, x, timestep, model_options=None, seed=None) -> Tensor:
        options = {**(model_options or {}), "sampler_cfg_function": rescaled(self.cfg_rescale)}
        negative, positive = self.conds.get("negative"), self.conds.get("positive")
        return comfy.samplers.sampling_function(
            self.inner_model, x, timestep, negative, positive, self.cfg, model_options=options, seed=seed
        )


def rescaled(cfg_rescale: float) -> Callable[[dict[str, Any]], Tensor]:
    """Our guidance as the host's `sampler_cfg_function`."""

    def guided(values: dict[str, Any]) -> Tensor:
        # x - denoised is sigma·epsilon, and the guidance of a multiple is the multiple of the guidance.
        if values["cond_scale"] == 1:
            return values["cond"]
        return guide(values["cond"], values["uncond"], values["cond_scale"], cfg_rescale)

    return guided


class CascadeSampler(comfy.samplers.Sampler):
    """One of our samplers as the host's SAMPLER, over the levels of one run. Starts a stopwatch once all is loaded."""

    def __init__(self, run: SamplingRun, later_noise: Callable[[], Tensor]):
        self.run = run
        self.later_noise = later_noise
        self.stopwatch: Stopwatch | None = None

    def sample(
        self,
        model_wrap,
        sigmas,
        extra_args,
        callback,
        noise,
        latent_image=None,
        denoise_mask=None,
        disable_pbar=False,
    ) -> Tensor:
        self.stopwatch = Stopwatch(noise.device)
        model = comfy.samplers.KSamplerX0Inpaint(model_wrap, sigmas)
        model.latent_image, model.noise = latent_image, noise  # what it keeps outside the mask
        steps = self.run.steps
        model_options = extra_args["model_options"]
        options = model_options.setdefault("transformer_options", {})
        schedule = model_wrap.inner_model.model_sampling

        def noise_of(log_snr: Tensor) -> float | None:
            """The noise condition of all rows, known before the device is asked; None where others may change it."""
            if (
                "model_function_wrapper" in model_options
                or options.get("wrappers")
                or log_snr.unique().numel() > 1
            ):
                return None
            return float(schedule.timestep((log_snr[:1].float() / -2).exp()))

        def predict(x: Tensor, log_snr: Tensor) -> Tensor:
            comfy.model_management.throw_exception_if_processing_interrupted()
            noise_cond = noise_of(log_snr) if x.is_cuda else None
            log_snr = log_snr.to(x.device, non_blocking=x.is_cuda)
            a, b = (per_image(value, x) for value in alpha_sigma(log_snr))
            sigma = (log_snr / -2).exp()
            if noise_cond is not None:
                options[NOISE] = sigma, noise_cond
            denoised = model(x / a, sigma, denoise_mask=denoise_mask, **extra_args)
            return (x - a * denoised) / b

        def report(step: SamplerStep) -> None:
            if callback is not None:
                callback(step.index, step.x0, step.x, steps)

        draws = chain([noise], iter(self.later_noise, None))
        latent = torch.zeros_like(noise) if latent_image is None else latent_image
        # The mask is the host's to apply at each step, so that its nodes may change it.
        sampled = sample_run(replace(self.run, latent=latent, mask=None), predict, report, draws.__next__)
        return sampled if denoise_mask is None else torch.lerp(latent, sampled, denoise_mask)


def sample(request: SamplingRequest) -> SamplingResult:
    run = request.run
    patcher = with_shift(request.model, run.shift)
    if request.kind == "stage_b":
        patcher = in_tiles(patcher, request.tile_positions, run.latent.shape[-2:])
    if not request.engine:
        patcher = patcher.clone()
        patcher.model_options["transformer_options"][ENGINE] = False
    source = run.noise()
    guider = CascadeGuider(patcher, request.cfg, request.cfg_rescale)
    guider.set_conds(request.positive, request.negative)
    sampler = CascadeSampler(run, source.draw)
    sampled = guider.sample(
        source.draw(),
        run.latent,
        sampler,
        (run.log_snrs() / -2).exp(),
        denoise_mask=run.mask,
        callback=step_callback(patcher, run.steps, request.kind),
        seed=run.seed,
    )
    stopwatch = sampler.stopwatch or Stopwatch(patcher.load_device)
    return stopwatch.stop(sampled.to(comfy.model_management.intermediate_device(), torch.float32))


def with_guidance(patcher: Any, cfg_rescale: float, shift: float) -> Any:
    patched = with_shift(patcher, shift)
    patched = patcher.clone() if patched is patcher else patched
    patched.set_model_sampler_cfg_function(rescaled(cfg_rescale))
    return patched


def with_shift(patcher: Any, shift: float) -> Any:
    """The MODEL with the run's schedule, by which the host turns shares of the steps into sigmas."""
    current = patcher.get_model_object("model_sampling")
    if not isinstance(current, comfy.model_sampling.StableCascadeSampling):
        current = new_schedule(patcher.model.model_config)
    elif current.shift == shift:
        return patcher
    schedule = copy.deepcopy(current)
    keep_on_device(schedule)
    schedule.shift = shift
    # What the host's `set_parameters` does one time after another, which takes a second.
    times = torch.arange(1, schedule.num_timesteps + 1) / schedule.num_timesteps
    _set_tables(schedule, schedule.sigma(times).float())
    patched = patcher.clone()
    patched.add_object_patch("model_sampling", schedule)
    return patched


def _set_tables(schedule: Any, sigmas: Tensor) -> None:
    """As plain attributes, not buffers.

    Where the host pages weights (dynamic VRAM) it keeps a model's buffers by name and gives them back to whichever
    schedule is in place by then: this one's would become the model's own.
    """
    for name, table in (("sigmas", sigmas), ("log_sigmas", sigmas.log())):
        schedule._buffers.pop(name, None)
        setattr(schedule, name, table)
    schedule.register_buffer = _keep_tables


def _keep_tables(*_: Any, **__: Any) -> None:
    """The model's own buffers are not this schedule's."""
