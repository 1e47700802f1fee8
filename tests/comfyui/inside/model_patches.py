"""Effects on a MODEL of native nodes, and of nodes like those of well-known packs, in our samplers and in KSampler."""

import importlib
import importlib.util
import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch as replaced

import comfy.hooks
import comfy.samplers
import comfy_extras.nodes_post_processing  # noqa: F401 (before nodes_latent, which imports it in turn)
import native
import pack_patches
import torch
from comfy.patcher_extension import WrappersMP
from comparing import relative
from interop import NATIVE, OURS, SEED, RunToZero, encode, load, make_run, only
from torch import Tensor

import nodes
from cascade_nodes.demo.pipeline import WEIGHTS
from cascade_nodes.nodes import scheduling
from cascade_nodes.nodes.hosts import comfyui
from cascade_nodes.nodes.hosts.comfyui import model as hosted_model
from cascade_nodes.nodes.hosts.comfyui import patcher as hosted_patcher

STEPS, CFG = 4, 3.0
SHIFT = 2.0  # of ComfyUI's own Stage C

# Node: its module in comfy_extras, its class, and its inputs beside the MODEL.
NATIVE_NODES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "APG": ("apg", "APG", {"eta": 1.0, "norm_threshold": 5.0, "momentum": 0.0}),
    "CFGNorm": ("cfg", "CFGNorm", {"strength": 1.0}),
    "CFGZeroStar": ("cfg", "CFGZeroStar", {}),
    "ContextWindowsManual": (
        "context_windows",
        "ContextWindowsManualNode",
        {
            "context_length": 4, "context_overlap": 2, "context_schedule": "standard_static", "context_stride": 1,
            "closed_loop": False, "fuse_method": "pyramid", "dim": 2,
        },
    ),
    "DifferentialDiffusion": ("differential_diffusion", "DifferentialDiffusion", {}),
    "EasyCache": (
        "easycache",
        "EasyCacheNode",
        {"reuse_threshold": 1.0, "start_percent": 0.1, "end_percent": 0.95, "verbose": False},
    ),
    "Epsilon Scaling": ("eps", "EpsilonScaling", {"scaling_factor": 1.05}),
    "FreeU": ("freelunch", "FreeU", {"b1": 1.1, "b2": 1.2, "s1": 0.9, "s2": 0.2}),
    "FreeU_V2": ("freelunch", "FreeU_V2", {"b1": 1.1, "b2": 1.2, "s1": 0.9, "s2": 0.2}),
    "FreSca": ("fresca", "FreSca", {"scale_low": 1.0, "scale_high": 1.25, "freq_cutoff": 2}),
    "HyperTile": ("hypertile", "HyperTile", {"tile_size": 256, "swap_size": 2, "max_depth": 0, "scale_depth": False}),
    "LatentApplyOperationCFG": ("latent", "LatentApplyOperationCFG", {"operation": lambda latent, **_: 1.1 * latent}),
    "LazyCache": (
        "easycache",
        "LazyCacheNode",
        {"reuse_threshold": 1.0, "start_percent": 0.1, "end_percent": 0.95, "verbose": False},
    ),
    "Mahiro": ("mahiro", "Mahiro", {}),
    "ModelAttentionBackend": ("model_advanced", "ModelAttentionBackend", {"attention": "pytorch attention"}),
    "ModelComputeDtype": ("model_advanced", "ModelComputeDtype", {"dtype": "bf16"}),
    "ModelSamplingAuraFlow": ("model_advanced", "ModelSamplingAuraFlow", {"shift": 3.0}),
    "ModelSamplingContinuousEDM": (
        "model_advanced",
        "ModelSamplingContinuousEDM",
        {"sampling": "eps", "sigma_max": 120.0, "sigma_min": 0.002},
    ),
    "ModelSamplingContinuousV": (
        "model_advanced",
        "ModelSamplingContinuousV",
        {"sampling": "v_prediction", "sigma_max": 120.0, "sigma_min": 0.002},
    ),
    "ModelSamplingDiscrete": ("model_advanced", "ModelSamplingDiscrete", {"sampling": "eps", "zsnr": False}),
    "ModelSamplingFlux": (
        "model_advanced",
        "ModelSamplingFlux",
        {"max_shift": 1.15, "base_shift": 0.5, "width": 512, "height": 512},
    ),
    "ModelSamplingSD3": ("model_advanced", "ModelSamplingSD3", {"shift": 3.0}),
    "ModelSamplingStableCascade": ("model_advanced", "ModelSamplingStableCascade", {"shift": 8.0}),
    "NAGuidance": ("nag", "NAGuidance", {"nag_scale": 5.0, "nag_alpha": 0.5, "nag_tau": 1.5}),
    "PatchModelAddDownscale": (
        "model_downscale",
        "PatchModelAddDownscale",
        {
            "block_number": 3, "downscale_factor": 2.0, "start_percent": 0.0, "end_percent": 0.35,
            "downscale_after_skip": True, "downscale_method": "bicubic", "upscale_method": "bicubic",
        },
    ),
    "PerturbedAttentionGuidance": ("pag", "PerturbedAttentionGuidance", {"scale": 3.0}),
    "RenormCFG": ("lumina2", "RenormCFG", {"cfg_trunc": 100.0, "renorm_cfg": 1.0}),
    "RescaleCFG": ("model_advanced", "RescaleCFG", {"multiplier": 0.7}),
    "ScaleROPE": (
        "rope",
        "ScaleROPE",
        {"scale_x": 1.0, "shift_x": 0.0, "scale_y": 1.0, "shift_y": 0.0, "scale_t": 1.0, "shift_t": 0.0},
    ),
    "SelfAttentionGuidance": ("sag", "SelfAttentionGuidance", {"scale": 0.5, "blur_sigma": 2.0}),
    "SkipLayerGuidanceDiT": (
        "slg",
        "SkipLayerGuidanceDiT",
        {"scale": 3.0, "start_percent": 0.0, "end_percent": 1.0, "double_layers": "7", "single_layers": "7"},
    ),
    "SkipLayerGuidanceDiTSimple": (
        "slg",
        "SkipLayerGuidanceDiTSimple",
        {"start_percent": 0.0, "end_percent": 1.0, "double_layers": "7", "single_layers": "7"},
    ),
    "TCFG": ("tcfg", "TCFG", {}),
    "TemporalScoreRescaling": ("eps", "TemporalScoreRescaling", {"tsr_k": 0.95, "tsr_sigma": 1.0}),
    "TomePatchModel": ("tomesd", "TomePatchModel", {"ratio": 0.3}),
    "UNetCrossAttentionMultiply": (
        "attention_multiply", "UNetCrossAttentionMultiply", {"q": 2.0, "k": 1.0, "v": 1.0, "out": 1.0},
    ),
    "UNetSelfAttentionMultiply": (
        "attention_multiply", "UNetSelfAttentionMultiply", {"q": 2.0, "k": 1.0, "v": 1.0, "out": 1.0},
    ),
    "UNetTemporalAttentionMultiply": (
        "attention_multiply",
        "UNetTemporalAttentionMultiply",
        {"self_structural": 2.0, "self_temporal": 1.0, "cross_structural": 1.0, "cross_temporal": 1.0},
    ),
    "VideoLinearCFGGuidance": ("video_model", "VideoLinearCFGGuidance", {"min_cfg": 1.0}),
}  # fmt: skip

LATER_INPUTS = {"freenoise": False}  # of newer versions

WRAPPED = {
    f"Wrapped, {kind}": (lambda model, kind=kind: pack_patches.Wrapped().patch(model, kind))
    for kind in (
        WrappersMP.OUTER_SAMPLE,
        WrappersMP.SAMPLER_SAMPLE,
        WrappersMP.PREDICT_NOISE,
        WrappersMP.CALC_COND_BATCH,
        WrappersMP.APPLY_MODEL,
        WrappersMP.DIFFUSION_MODEL,
    )
}
PACK_NODES = (
    "AutomaticGuidance", "ClonesTwice", "FewerSigmas", "Failing", "ForgottenOption", "Injected", "OtherAttention",
    "OtherCosine", "OwnGuidanceAfter", "PerturbedSometimes", "PictureAdapter", "ReplacedLayer", "SkimmedGuidance",
    "StepCache", "ThreeArguments", "Thresholding",
)  # fmt: skip


GUIDANCE = (
    "CascadeGuidance", "CFGNorm", "OwnGuidanceAfter", "PerpNeg", "RescaleCFG", "ThreeArguments", "Thresholding",
)  # fmt: skip
ON_NATIVE = (
    "EasyCache", "ModelSamplingDiscrete", "ModelSamplingStableCascade", "OtherAttention", "PerpNeg", "ReplacedLayer",
    "RescaleCFG", "TomePatchModel",
)  # fmt: skip


def native_node(name: str, model: Any) -> Any:
    """The MODEL that a native node makes of one; AttributeError where this version has no such node."""
    module, class_name, inputs = NATIVE_NODES[name]
    path = f"comfy_extras.nodes_{module}"
    if importlib.util.find_spec(path) is None:
        raise AttributeError(path)
    node = getattr(importlib.import_module(path), class_name)
    run = node.execute if hasattr(node, "execute") else getattr(node(), node.FUNCTION)
    later = {name: value for name, value in LATER_INPUTS.items() if name in inspect.signature(run).parameters}
    return only(run(model=model, **inputs, **later))


def cases(empty: Any) -> dict[str, Callable[[Any], Any]]:
    """Each case's name with what it makes of a MODEL."""
    perp_neg = importlib.import_module("comfy_extras.nodes_perpneg").PerpNeg
    return {
        **{name: (lambda model, name=name: native_node(name, model)) for name in NATIVE_NODES},
        "PerpNeg": lambda model: only(perp_neg.execute(model, empty, 1.0)),
        "CascadeGuidance": lambda model: only(scheduling.CascadeGuidance.execute(model, 0.5, SHIFT)),
        **WRAPPED,
        **{name: getattr(pack_patches, name)().patch for name in PACK_NODES},
    }


class Samplers:
    """One MODEL, sampled by ours and by KSampler from the same noise over the same levels."""

    def __init__(self, prompts: tuple[Any, Any]):
        self.prompts = prompts
        self.told: list[str] = []  # by KSampler on our MODEL

    def ours(self, model: Any, **changed: Any) -> Any:
        settings = {"steps": STEPS, "cfg": CFG, "shift": SHIFT, **changed}
        return comfyui.sample(make_run("stage_c", model, self.prompts, RunToZero, **settings))

    def ksampler(self, model: Any, sampler: str = "ddim", **latent: Tensor) -> Tensor:
        self.told.clear()
        latent = {"samples": torch.zeros(1, 16, 6, 6), **latent}
        with (
            replaced.object(hosted_model, "notify", self.told.append),
            replaced.object(hosted_patcher, "notify", self.told.append),
        ):
            return only(nodes.KSampler().sample(
                model, SEED, STEPS, CFG, sampler, "simple", *self.prompts, latent
            ))["samples"]  # fmt: skip


def attempt(run: Callable[[], Any]) -> tuple[Any, str | None]:
    try:
        return run(), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def case(
    samplers: Samplers, make: Callable[[Any], Any], model: Any, plain: Tensor, full: bool, guidance: bool
) -> dict[str, Any]:
    """What one case does.  full: in KSampler too; guidance: with cfg_rescale too"""
    try:
        patched = make(model)
    except Exception as error:
        return {"node": f"{type(error).__name__}: {error}"}
    result, error = attempt(lambda: samplers.ours(patched))
    if result is None:
        return {"error": error, "by KSampler": attempt(lambda: samplers.ksampler(patched))[1]}
    found = {"effect": relative(result.latent, plain), "notices": list(result.notices)}
    if full:
        theirs, error = attempt(lambda: samplers.ksampler(patched))
        found["told"] = list(samplers.told)
        if theirs is None:
            return {**found, "error": error}
        found["against KSampler"] = relative(result.latent, theirs)
    if guidance:
        found["notices with cfg_rescale"] = list(samplers.ours(patched, cfg_rescale=0.7).notices)
    return found


def schedules(samplers: Samplers, model: Any) -> dict[str, Any]:
    """Results of a schedule on the MODEL against a run of its shift, with other levels, and without levels."""
    eight = native_node("ModelSamplingStableCascade", model)
    ours = scheduling.CascadeGuidance.execute
    zero = NATIVE_NODES["ModelSamplingStableCascade"][0]
    node = importlib.import_module(f"comfy_extras.nodes_{zero}").ModelSamplingStableCascade()
    same = make_run("stage_c", eight, samplers.prompts, shift=2.0)
    right = make_run("stage_c", model, samplers.prompts, shift=8.0)
    own = make_run("stage_c", only(ours(model, 0.7, 2.0)), samplers.prompts, shift=2.0, cfg_rescale=0.7)
    plain = make_run("stage_c", model, samplers.prompts, shift=2.0, cfg_rescale=0.7)
    agreeing = comfyui.sample(own)
    return {
        "as with its shift": relative(comfyui.sample(same).latent, comfyui.sample(right).latent),
        "no levels": attempt(lambda: samplers.ours(only(node.patch(model, 0.0))))[1],
        "agreeing": relative(agreeing.latent, comfyui.sample(plain).latent),
        "agreeing, notices": list(agreeing.notices),
    }


def masks(samplers: Samplers, model: Any) -> dict[str, float]:
    """DifferentialDiffusion with a soft mask: our sampler against KSampler."""
    latent = torch.randn(1, 16, 6, 6)
    mask = torch.linspace(0, 1, 6).repeat(6, 1)[None]
    patched = native_node("DifferentialDiffusion", model)
    ours = {
        name: samplers.ours(each, latent=latent, mask=mask).latent
        for name, each in (("patched", patched), ("plain", model))
    }
    theirs = samplers.ksampler(patched, "euler", samples=latent, noise_mask=mask)
    return {
        "against KSampler": relative(ours["patched"], theirs),
        "effect": relative(ours["patched"], ours["plain"]),
        "kept outside": relative(ours["patched"][..., 0], latent[..., 0]),
    }


def hooks(samplers: Samplers, model: Any) -> dict[str, float]:
    """Options that come with a prompt's hooks: wrappers around the network."""

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        return 1.1 * executor(*args, **kwargs)

    def hooked(scope: Any) -> tuple[Any, Any]:
        options = {"wrappers": {WrappersMP.DIFFUSION_MODEL: {"tests": [wrapper]}}}
        group = comfy.hooks.HookGroup()
        group.add(comfy.hooks.TransformerOptionsHook(options, hook_scope=scope))
        positive, negative = samplers.prompts
        return [[states, {**values, "hooks": group}] for states, values in positive], negative

    scopes = comfy.hooks.EnumHookScope
    plain, found = samplers.ours(model).latent, {}
    for name, scope in (("all", scopes.AllConditioning), ("one", scopes.HookedOnly)):
        with_hook = Samplers(hooked(scope))
        ours, theirs = with_hook.ours(model).latent, with_hook.ksampler(model)
        found |= {
            f"{name}, against KSampler": relative(ours, theirs),
            f"{name}, effect": relative(ours, plain),
        }
    return found


def measure() -> dict[str, Any]:
    clip = comfyui.load_text_encoder(WEIGHTS / "demo_text_encoder")
    samplers = Samplers(encode(OURS, clip))
    empty = only(nodes.CLIPTextEncode().encode(clip, ""))
    with tempfile.TemporaryDirectory() as folder:
        loaded = load(native.wide_stage_c(Path(folder)))
    model, native_model = (loaded[program]["stage_c"] for program in (OURS, NATIVE))
    before = samplers.ours(model)
    plain, native_plain = before.latent, samplers.ours(native_model).latent
    makers = cases(empty)
    results = {
        OURS: {
            name: case(samplers, make, model, plain, True, name in GUIDANCE) for name, make in makers.items()
        },
        NATIVE: {
            name: case(samplers, makers[name], native_model, native_plain, False, False) for name in ON_NATIVE
        },
    }
    counted = pack_patches.Counted()
    samplers.ours(counted.patch(model))
    wrapped = WRAPPED["Wrapped, diffusion_model"](loaded[OURS]["stage_b"])
    tiled = comfyui.sample(make_run("stage_b", wrapped, samplers.prompts, tile_positions=16))
    after = samplers.ours(model)
    return {
        **results,
        "schedules": schedules(samplers, model),
        "masks": masks(samplers, model),
        "hooks": hooks(samplers, model),
        "callbacks": sorted(set(counted.calls)),
        "tiled": list(tiled.notices),
        "the MODEL itself": relative(after.latent, before.latent),
        "the MODEL itself, notices": list(after.notices),
    }
