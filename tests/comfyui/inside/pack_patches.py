"""Patches on a MODEL as well-known packs make them, written for the tests."""

from typing import Any

import comfy.model_sampling
import comfy.samplers
from comfy.model_patcher import set_model_options_patch_replace
from comfy.patcher_extension import CallbacksMP, PatcherInjection, WrappersMP


class Thresholding:
    """Guidance of its own, as Dynamic Thresholding puts there."""

    def patch(self, model: Any) -> Any:
        def guidance(args: dict[str, Any]) -> Any:
            guided = args["uncond"] + args["cond_scale"] * (args["cond"] - args["uncond"])
            return guided.clamp(-0.8 * guided.abs().max(), 0.8 * guided.abs().max())

        patched = model.clone()
        patched.set_model_sampler_cfg_function(guidance)
        return patched


class ThreeArguments:
    """Guidance as a function of three arguments, which the host still takes."""

    def patch(self, model: Any) -> Any:
        patched = model.clone()
        patched.set_model_sampler_cfg_function(lambda cond, uncond, cfg: uncond + 0.5 * cfg * (cond - uncond))
        return patched


def skim(model: Any) -> Any:
    def before(args: dict[str, Any]) -> Any:
        cond, uncond = args["conds_out"]
        return [cond, uncond + 0.3 * (cond - uncond)]

    patched = model.clone()
    patched.set_model_sampler_pre_cfg_function(before, disable_cfg1_optimization=True)
    return patched


class SkimmedGuidance:
    """Changes both predictions before the guidance, at cfg 1 too."""

    def patch(self, model: Any) -> Any:
        return skim(model)


class ClonesTwice:
    """Clones the MODEL, and hands the clone to a function that clones it again and patches that."""

    def patch(self, model: Any) -> Any:
        return skim(model.clone())


class OwnGuidanceAfter:
    """Makes its own guidance of the two predictions, after the sampler's."""

    def patch(self, model: Any) -> Any:
        def after(args: dict[str, Any]) -> Any:
            return args["uncond_denoised"] + 2 * (args["cond_denoised"] - args["uncond_denoised"])

        patched = model.clone()
        patched.set_model_sampler_post_cfg_function(after)
        return patched


class AutomaticGuidance:
    """Computes both predictions itself."""

    def patch(self, model: Any) -> Any:
        def predictions(args: dict[str, Any]) -> Any:
            out = comfy.samplers.calc_cond_batch(
                args["model"], args["conds"], args["input"], args["sigma"], args["model_options"]
            )
            return [out[0], 0.9 * out[1]]

        patched = model.clone()
        patched.set_model_sampler_calc_cond_batch_function(predictions)
        return patched


class StepCache:
    """Keeps the network's output for the next step, as TeaCache does; its own settings are options."""

    def patch(self, model: Any) -> Any:
        kept: dict[str, Any] = {"sigma": 0.0}

        def wrapper(apply_model: Any, args: dict[str, Any]) -> Any:
            sigma = float(args["timestep"][0])
            if sigma > kept["sigma"]:
                kept["number"] = 0  # another run
            if kept["number"] % args["c"]["transformer_options"]["step_cache_every"] == 0:
                kept["output"] = apply_model(args["input"], args["timestep"], **args["c"])
            kept.update(sigma=sigma, number=kept["number"] + 1)
            return kept["output"]

        patched = model.clone()
        patched.model_options["transformer_options"]["step_cache_every"] = 2
        patched.set_model_unet_function_wrapper(wrapper)
        return patched


class Wrapped:
    """A wrapper of some kind that makes what it wraps stronger."""

    def patch(self, model: Any, kind: str) -> Any:
        def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
            out = executor(*args, **kwargs)
            return [1.1 * one for one in out] if isinstance(out, list) else 1.1 * out

        patched = model.clone()
        patched.add_wrapper_with_key(kind, "tests", wrapper)
        return patched


class FewerSigmas:
    """Leaves out levels of the sampler's schedule."""

    def patch(self, model: Any) -> Any:
        def wrapper(executor: Any, guider: Any, sigmas: Any, *args: Any) -> Any:
            return executor(guider, sigmas[::2] if len(sigmas) % 2 else sigmas[1::2], *args)

        patched = model.clone()
        patched.add_wrapper(WrappersMP.SAMPLER_SAMPLE, wrapper)
        return patched


class PictureAdapter:
    """Replaces attention of the SD family's blocks by an object, as IPAdapter does."""

    class CrossAttention:
        def __call__(self, q: Any, k: Any, v: Any, extra_options: Any) -> Any:
            return q

    def patch(self, model: Any) -> Any:
        patched = model.clone()
        patched.set_model_attn2_replace(self.CrossAttention(), "input", 4)
        return patched


class PerturbedSometimes:
    """Patches attention for a prediction of its own alone."""

    def patch(self, model: Any) -> Any:
        def values(q: Any, k: Any, v: Any, extra_options: Any, mask: Any = None) -> Any:
            return v

        def after(args: dict[str, Any]) -> Any:
            options = set_model_options_patch_replace(
                args["model_options"].copy(), values, "attn1", "middle", 0
            )
            (perturbed,) = comfy.samplers.calc_cond_batch(
                args["model"], [args["cond"]], args["input"], args["sigma"], options
            )
            return args["denoised"] + 3 * (args["cond_denoised"] - perturbed)

        patched = model.clone()
        patched.set_model_sampler_post_cfg_function(after)
        return patched


class OtherAttention:
    """Computes attention by a kernel of its own, as nodes for SageAttention do."""

    def patch(self, model: Any) -> Any:
        def attention(function: Any, q: Any, k: Any, v: Any, heads: int, *args: Any, **kwargs: Any) -> Any:
            return function(0.5 * q, k, v, heads, *args, **kwargs)

        patched = model.clone()
        patched.model_options["transformer_options"]["optimized_attention_override"] = attention
        return patched


class ReplacedLayer:
    """Replaces a layer's forward for as long as the MODEL is loaded."""

    def patch(self, model: Any) -> Any:
        patched = model.clone()
        forward = patched.get_model_object("diffusion_model.clf.1").forward
        patched.add_object_patch("diffusion_model.clf.1.forward", lambda x: 1.1 * forward(x))
        return patched


class Injected:
    """Replaces a layer's forward by an injection, as LoRAs in bypass mode do."""

    def patch(self, model: Any) -> Any:
        layer = model.model.diffusion_model.clf[1]
        forward = layer.forward

        def inject(patcher: Any) -> None:
            layer.forward = lambda x: 1.1 * forward(x)

        def eject(patcher: Any) -> None:
            layer.__dict__.pop("forward", None)

        patched = model.clone()
        patched.set_injections("tests", [PatcherInjection(inject=inject, eject=eject)])
        return patched


class Counted:
    """Calls that the host makes at the beginning and the end of a run."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def patch(self, model: Any) -> Any:
        patched = model.clone()
        for kind in (CallbacksMP.ON_PRE_RUN, CallbacksMP.ON_PREPARE_STATE, CallbacksMP.ON_CLEANUP):
            patched.add_callback(kind, lambda *_, kind=kind: self.calls.append(kind))
        return patched


class ForgottenOption:
    """Puts an option on the MODEL that only samplers of its own pack read."""

    def patch(self, model: Any) -> Any:
        patched = model.clone()
        patched.model_options["only_their_sampler_reads"] = 1.0
        return patched


class OtherCosine:
    """A schedule of Stable Cascade's kind with another cosine."""

    def patch(self, model: Any) -> Any:
        class Schedule(comfy.model_sampling.StableCascadeSampling, comfy.model_sampling.EPS):
            pass

        schedule = Schedule(model.model.model_config)
        schedule.set_parameters(2.0, 0.2)
        patched = model.clone()
        patched.add_object_patch("model_sampling", schedule)
        return patched


class Failing:
    """Fails on what it was not made for."""

    def patch(self, model: Any) -> Any:
        def after(args: dict[str, Any]) -> Any:
            return args["denoised"] + args["model"].diffusion_model.no_such_block.scale

        patched = model.clone()
        patched.set_model_sampler_post_cfg_function(after)
        return patched
