# pyright: reportMissingImports=false
"""A sampling run inside ComfyUI's guider, with our guidance and samplers; ComfyUI handles areas, hooks, LoRA, memory.

The host works with x / a, noised by sigma = b / a = exp(-log_snr / 2), and predicts the clean latent; our
samplers work with a·x0 + b·epsilon and predict epsilon.
"""

import copy
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeVar

import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ....cascade_core.checkpoints import KIND_NAMES
from ....cascade_core.diffusion.guidance import guide
from ....cascade_core.diffusion.samplers import SamplerStep
from ....cascade_core.diffusion.schedule import alpha_sigma, log_snr, per_image
from ....cascade_core.errors import CascadeError
from ....cascade_core.placement import out_of_memory
from ....cascade_core.run import SamplingResult, SamplingRun, Stopwatch
from ....cascade_core.run import sample as sample_run
from ..notices import Notice
from ..run import SamplingRequest
from .areas import part_the_prior, with_pixel_areas, wraps_the_network
from .conditions import keep_on_device, new_schedule
from .model import ENGINE, NOISE, HostedNetwork
from .patches import (
    NOTICES,
    Notices,
    called_for_each_tile,
    explain_failures,
    has_foreign_schedule,
    left_as_it_was,
    native_without_effect,
    origin,
    unread_by_host,
    unread_by_network,
    without_effect,
)
from .progress import step_callback
from .tiling import in_tiles

T = TypeVar("T")
NOISELESS = 60.0  # log-SNR at which noise vanishes in float32


class CascadeGuider(comfy.samplers.CFGGuider):
    """The host's guider with the published guidance, unless the MODEL carries another."""

    def __init__(self, patcher: Any, cfg: float, cfg_rescale: float, notices: Notices):
        super().__init__(patcher)
        self.set_cfg(cfg)
        self.guidance = RescaledGuidance(cfg_rescale)
        self.notices = notices

    def predict_noise(self, x, timestep, model_options=None, seed=None) -> Tensor:
        options = {"sampler_cfg_function": self.guidance, **(model_options or {})}
        guidance, rescale = options["sampler_cfg_function"], self.guidance.cfg_rescale
        if guidance != self.guidance and (rescale != 0 or isinstance(guidance, RescaledGuidance)):
            self._not_used(guidance)
        elif rescale != 0 and "sampler_post_cfg_function" in options:
            options["sampler_post_cfg_function"] = list(
                map(self._watched, options["sampler_post_cfg_function"])
            )
        negative, positive = self.conds.get("negative"), self.conds.get("positive")
        return comfy.samplers.sampling_function(
            self.inner_model, x, timestep, negative, positive, self.cfg, model_options=options, seed=seed
        )

    def _watched(self, after_guidance: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
        """Wraps the function, and records a notice if it computes its own guidance from the two predictions."""

        def call(values: dict[str, Any]) -> Tensor:
            watched = WatchedDict(values)
            result = after_guidance(watched)
            if "denoised" not in watched.read:
                self._not_used(after_guidance)
            return result

        return call

    def _not_used(self, guidance: Any) -> None:
        self.notices.add(Notice("guidance", node=origin(guidance), value=f"{self.guidance.cfg_rescale:g}"))


class WatchedDict(UserDict):
    """A dict that knows which of its values were read."""

    def __init__(self, values: dict[str, Any]):
        self.read: set[str] = set()
        super().__init__(values)

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)


@dataclass(frozen=True)
class RescaledGuidance:
    """The published guidance, which rescales the contrast per image, as the host's `sampler_cfg_function`."""

    cfg_rescale: float

    def __call__(self, values: dict[str, Any]) -> Tensor:
        # x - denoised is sigma·epsilon, and guidance is linear in a common factor.
        if values["cond_scale"] == 1:
            return values["cond"]
        return guide(values["cond"], values["uncond"], values["cond_scale"], self.cfg_rescale)


@dataclass(frozen=True)
class LevelledRun(SamplingRun):
    """A run with given noise levels, from the MODEL's schedule or a wrapper around the sampler."""

    levels: Tensor | None = None

    def log_snrs(self) -> Tensor:
        return super().log_snrs() if self.levels is None else self.levels

    def start(self, noise: Tensor) -> Tensor:
        """Pure noise if the first level is the noisiest of the schedule."""
        first = self.log_snrs()[:1]
        if self.denoise == 1 and first <= super().log_snrs()[0] + 1e-4:
            return super().start(noise)
        a, b = alpha_sigma(first.to(noise.device))
        return a * self.latent + b * noise


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
        run = self._run_at(sigmas.cpu())
        model = comfy.samplers.KSamplerX0Inpaint(model_wrap, sigmas)
        model.latent_image, model.noise = latent_image, noise  # kept outside of the mask
        steps = run.steps
        model_options = extra_args["model_options"]
        options = model_options.setdefault("transformer_options", {})
        schedule = model_wrap.inner_model.model_sampling

        def noise_of(log_snr: Tensor) -> float | None:
            """The noise condition of all rows, without reading the device; None where wrappers may change it."""
            if (
                "model_function_wrapper" in model_options
                or wraps_the_network(options)
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
        # The host applies the mask at each step, so that its nodes can change it.
        sampled = sample_run(replace(run, latent=latent, mask=None), predict, report, draws.__next__)
        if denoise_mask is None:
            return sampled
        if "denoise_mask_function" in model_options:  # a node changed the mask, so the last step's is used
            change = model_options["denoise_mask_function"]
            options_of_mask = {"model": model_wrap, "sigmas": sigmas}
            sigma = sigmas[-2].expand(len(sampled))
            denoise_mask = change(sigma, denoise_mask, extra_options=options_of_mask)
        return torch.lerp(latent, sampled, denoise_mask)

    def _run_at(self, sigmas: Tensor) -> SamplingRun:
        """The run at the levels received, which wrappers on the MODEL may have changed."""
        if torch.equal(sigmas, sigmas_of(self.run)):
            return self.run
        levels = (-2 * sigmas.float().log()).clamp(max=NOISELESS)
        return LevelledRun(**{**vars(self.run), "steps": len(sigmas) - 1, "levels": levels})


def sample(request: SamplingRequest) -> SamplingResult:
    notices = Notices()
    stage = KIND_NAMES[request.kind]
    patcher, run = scheduled(request.model, request.run, notices)
    for sentence in (
        *unread_by_host(patcher),
        *unread_by_network(patcher, stage),
        *left_as_it_was(request.model, stage),
    ):
        notices.add(sentence)
    patcher = with_pixel_areas(patcher, request.compression)
    if request.kind == "stage_b":
        if request.tile_positions:
            for sentence in called_for_each_tile(patcher):
                notices.add(sentence)
        patcher = in_tiles(patcher, request.tile_positions, run.latent.shape[-2:])
    options = patcher.model_options["transformer_options"]
    options.update({ENGINE: request.engine, NOTICES: notices})
    if not isinstance(patcher.get_model_object("diffusion_model"), HostedNetwork):
        tell_of_native(patcher, stage, notices)
        explain_failures(patcher, stage)
        if request.kind == "stage_b":
            part_the_prior(patcher)

    def sample_once() -> tuple[Tensor, CascadeSampler]:
        source = run.noise()
        guider = CascadeGuider(patcher, request.cfg, request.cfg_rescale, notices)
        guider.set_conds(request.positive, request.negative)
        sampler = CascadeSampler(run, source.draw)
        sampled = guider.sample(
            source.draw(),
            run.latent,
            sampler,
            sigmas_of(run),
            denoise_mask=run.mask,
            callback=step_callback(patcher, run.steps, request.kind),
            seed=run.seed,
        )
        return sampled, sampler

    sampled, sampler = with_room(sample_once, notices)
    stopwatch = sampler.stopwatch or Stopwatch(patcher.load_device)
    result = stopwatch.stop(sampled.to(comfy.model_management.intermediate_device(), torch.float32))
    return replace(result, notices=tuple(notices.sentences))


def with_room(sample_once: Callable[[], T], notices: Notices) -> T:
    """Samples. Where memory runs out, unloads all other models and samples again from the beginning."""
    try:
        return sample_once()
    except Exception as error:
        if not out_of_memory(error):
            raise
    # The frames that refer to the run's tensors are gone only after the except block.
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    notices.add(Notice("memory"))
    return sample_once()


def sigmas_of(run: SamplingRun) -> Tensor:
    """Sigma = b / a, the host's measure of noise, at each level of a run."""
    return (run.log_snrs() / -2).exp()


def tell_of_native(patcher: Any, stage: str, notices: Notices) -> None:
    """Adds notices about patches without effect on the host's own network; our networks add theirs themselves."""
    for sentence in native_without_effect(patcher, stage):
        notices.add(sentence)

    def apply(
        execute, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **conds
    ):
        for sentence in without_effect(transformer_options or {}, stage):
            notices.add(sentence)
        return execute(x, t, c_concat, c_crossattn, control, transformer_options or {}, **conds)

    patcher.add_wrapper(WrappersMP.APPLY_MODEL, apply)


def scheduled(patcher: Any, run: SamplingRun, notices: Notices) -> tuple[Any, SamplingRun]:
    """The MODEL and the run with one schedule: the one that a node put on the MODEL, if it is of Cascade's kind, else
    the run's own.
    """
    schedule = patcher.object_patches.get("model_sampling")
    if schedule is None:
        return with_shift(patcher, run.shift), run
    node = origin(type(schedule))
    if has_foreign_schedule(patcher):
        notices.add(Notice("foreign", node=node, value=f"{run.shift:g}"))
        return with_shift(patcher, run.shift), run
    times = torch.linspace(run.denoise, 0, run.steps + 1)
    levels = -2 * schedule.sigma(times).float().log()
    if not (schedule.shift > 0 and levels.isfinite().all()):
        raise CascadeError(
            f"The schedule that {node} put on the MODEL (shift {schedule.shift:g}) has no levels of noise; choose a "
            "shift above 0 there."
        )
    if schedule.shift != run.shift:
        notices.add(Notice("schedule", node=node, shift=f"{schedule.shift:g}", value=f"{run.shift:g}"))
    run = replace(run, shift=schedule.shift)
    middle = torch.linspace(0.1, 0.9, 9)  # the host clamps the ends in another order
    if not torch.allclose(-2 * schedule.sigma(middle).log(), log_snr(middle, schedule.shift), atol=1e-2):
        run = LevelledRun(**{**vars(run), "levels": levels})
    return patcher, run


def with_guidance(patcher: Any, cfg_rescale: float, shift: float) -> Any:
    patched = with_shift(patcher, shift)
    patched = patcher.clone() if patched is patcher else patched
    patched.set_model_sampler_cfg_function(RescaledGuidance(cfg_rescale))
    return patched


def with_shift(patcher: Any, shift: float) -> Any:
    """The MODEL with the run's schedule, which the host uses to convert shares of the steps to sigmas."""
    current = patcher.get_model_object("model_sampling")
    if not isinstance(current, comfy.model_sampling.StableCascadeSampling):
        current = new_schedule(patcher.model.model_config)
    elif current.shift == shift:
        return patcher
    schedule = copy.deepcopy(current)
    keep_on_device(schedule)
    schedule.shift = shift
    # Like the host's `set_parameters`, which computes each time by itself and takes a second.
    times = torch.arange(1, schedule.num_timesteps + 1) / schedule.num_timesteps
    _set_tables(schedule, schedule.sigma(times).float())
    patched = patcher.clone()
    patched.add_object_patch("model_sampling", schedule)
    return patched


def _set_tables(schedule: Any, sigmas: Tensor) -> None:
    """Sets tables as plain attributes, not buffers.

    Where the host pages weights (dynamic VRAM), it saves a model's buffers by name and restores them to whatever
    schedule is set at that time, so this schedule's buffers would end up in the model's own.
    """
    for name, table in (("sigmas", sigmas), ("log_sigmas", sigmas.log())):
        schedule._buffers.pop(name, None)
        setattr(schedule, name, table)
    schedule.register_buffer = _keep_tables


def _keep_tables(*_: Any, **__: Any) -> None:
    """Does nothing, since the buffers that the host restores are the model's own, not this schedule's."""
