"""Our nodes and ComfyUI's own in every combination, and our samplers against its own."""

import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import comfy.samplers
import native
import torch
from comfy_extras import nodes_custom_sampler, nodes_stable_cascade
from comparing import relative
from torch import Tensor

import nodes
from cascade_nodes.cascade_core.run import SamplingRun
from cascade_nodes.demo.pipeline import WEIGHTS
from cascade_nodes.nodes import conditioning, latents, sampling, scheduling
from cascade_nodes.nodes.hosts import comfyui
from cascade_nodes.nodes.hosts.run import SamplingRequest

PROMPT, NEGATIVE = "a large red star on sand", "blue"
SIDE, STEPS, SEED = 128, 3, 5
OURS, NATIVE = "ours", "native"
WHO = (OURS, NATIVE)


def only(output: Any, index: int = 0) -> Any:
    """The single output of a node, of either API."""
    return (output.result if hasattr(output, "result") else output)[index]


def load(stage_c: Path) -> dict[str, dict[str, Any]]:
    """Stage C, B and A by our loaders, and by ComfyUI's own classes."""
    stage_b = WEIGHTS / "demo_stage_b.safetensors"
    return {
        OURS: {
            "stage_c": comfyui.load_network("stage_c", stage_c, "fp32"),
            "stage_b": comfyui.load_network("stage_b", stage_b, "fp32"),
            "stage_a": comfyui.load_stage_a(WEIGHTS / "demo_stage_a.safetensors"),
        },
        NATIVE: {
            "stage_c": native.model("stage_c", stage_c),
            "stage_b": native.model("stage_b", stage_b),
            "stage_a": native.vae(),
        },
    }


def encode(program: str, clip: Any) -> tuple[Any, Any]:
    if program == OURS:
        output = conditioning.CascadeTextEncode.execute(clip, PROMPT, NEGATIVE)
        return only(output), only(output, 1)
    encoder = nodes.CLIPTextEncode()
    return only(encoder.encode(clip, PROMPT)), only(encoder.encode(clip, NEGATIVE))


SETTINGS = {"seed": SEED, "steps": STEPS, "cfg": 2.0, "cfg_rescale": 0.0, "sampler": "ddim", "denoise": 1.0}


def prior(program: str, model: Any, positive: Any, negative: Any, latent: Any) -> Any:
    if program == OURS:
        settings = {**SETTINGS, "shift": 1.0}
        return only(sampling.CascadePriorSampler.execute(model, positive, negative, latent, **settings))
    return only(nodes.KSampler().sample(
        model, SEED, STEPS, SETTINGS["cfg"], "ddim", "simple", positive, negative, latent
    ))  # fmt: skip


def decoder(program: str, model: Any, positive: Any, negative: Any, stage_c: Any, latent: Any) -> Any:
    if program == OURS:
        settings = {**SETTINGS, "shift": 1.0}
        return only(
            sampling.CascadeDecoderSampler.execute(model, positive, negative, stage_c, latent, **settings)
        )
    with_prior = nodes_stable_cascade.StableCascade_StageB_Conditioning.execute(positive, stage_c)
    zeros = {"samples": torch.zeros_like(stage_c["samples"])}
    without = nodes_stable_cascade.StableCascade_StageB_Conditioning.execute(negative, zeros)
    return only(nodes.KSampler().sample(
        model, SEED, STEPS, SETTINGS["cfg"], "ddim", "simple", only(with_prior), only(without), latent
    ))  # fmt: skip


def decode(program: str, vae: Any, latent: Any) -> Tensor:
    if program == OURS:
        return only(latents.CascadeDecode.execute(vae, latent, 0))
    return only(nodes.VAEDecode().decode(vae, latent)).clamp(0, 1)  # as ComfyUI does when it saves


def matrix(loaded: dict[str, dict[str, Any]], clip: Any) -> dict[str, float]:
    """For each pair of samplers: how far apart the pictures of the eight ways to load, encode and decode are."""
    pictures: dict[tuple[str, str], list[Tensor]] = {}
    empty = latents.CascadeEmptyLatent.execute(SIDE, SIDE, 1, 42.67)
    prompts = {text: encode(text, clip) for text in WHO}
    for loader, text, first in product(WHO, repeat=3):
        stages = loaded[loader]
        stage_c = prior(first, stages["stage_c"], *prompts[text], only(empty))
        for second in WHO:
            stage_b = decoder(second, stages["stage_b"], *prompts[text], stage_c, only(empty, 1))
            decoded = [decode(last, stages["stage_a"], stage_b) for last in WHO]
            pictures.setdefault((first, second), []).extend(decoded)
    assert sum(map(len, pictures.values())) == 32
    assert all(tuple(one.shape) == (1, SIDE, SIDE, 3) for images in pictures.values() for one in images)
    return {
        f"matrix, prior sampler {first}, decoder sampler {second}": max(
            (one - images[0]).abs().max().item() for one in images
        )
        for (first, second), images in pictures.items()
    }


def native_latents(stages: dict[str, Any], prompts: tuple[Any, Any]) -> dict[str, float]:
    """Our samplers on the latents of StableCascade_EmptyLatentImage, against those on our own of the same sizes."""
    empty = {
        OURS: latents.CascadeEmptyLatent.execute(SIDE, SIDE, 2, 42.67),
        NATIVE: nodes_stable_cascade.StableCascade_EmptyLatentImage.execute(SIDE, SIDE, 42, 2),
    }
    stage_c = {program: prior(OURS, stages["stage_c"], *prompts, only(empty[program])) for program in WHO}
    stage_b = {
        program: decoder(OURS, stages["stage_b"], *prompts, stage_c[program], only(empty[program], 1))
        for program in WHO
    }
    return {
        f"{name} on the native latent": relative(made[NATIVE]["samples"], made[OURS]["samples"])
        for name, made in (("prior sampler", stage_c), ("decoder sampler", stage_b))
    }


class RunToZero(SamplingRun):
    """A run whose last level is free of noise, as ComfyUI's schedules end."""

    def log_snrs(self) -> Tensor:
        levels = super().log_snrs().clone()
        levels[-1] = 60.0
        return levels


# Settings of the request; all others are of its run.
REQUEST = ("cfg", "cfg_rescale", "tile_positions", "engine", "compression")


def make_run(
    kind: str, model: Any, prompts: tuple[Any, Any], of: type[SamplingRun] = SamplingRun, **changed: Any
) -> SamplingRequest:
    """Request of a run of that class; `changed` are settings of either."""
    sizes = {"stage_c": (1, 16, 6, 6), "stage_b": (1, 4, 32, 32)}
    values: dict[str, Any] = {"latent": torch.zeros(sizes[kind]), "shift": 1.0, **SETTINGS, **changed}
    request = {name: values.pop(name) for name in REQUEST if name in values}
    return SamplingRequest(kind, model, *prompts, of(**values), **request)


def samplers(loaded: dict[str, dict[str, Any]], prompts: dict[str, tuple[Any, Any]]) -> dict[str, float]:
    """Each of our samplers on our MODEL and on the native one of the same weights."""
    return {
        f"{sampler} on either {kind}": relative(
            *(
                comfyui.sample(
                    make_run(
                        kind, loaded[program][kind], prompts[kind], sampler=sampler, steps=10, cfg_rescale=0.7
                    )
                ).latent
                for program in WHO
            )
        )
        for kind in ("stage_c", "stage_b")
        for sampler in ("ddpm", "ddim", "lcm", "dpmpp_2m")
    }


def against_native_sampling(model: Any, prompts: tuple[Any, Any]) -> dict[str, float]:
    """Our DDIM against KSampler's, and against SamplerCustomAdvanced with our schedule and guidance."""
    latent = {"samples": torch.zeros(1, 16, 6, 6)}
    steps, cfg = 10, SETTINGS["cfg"]
    plain = {"steps": steps, "shift": 2.0}  # the shift of ComfyUI's own Stage C
    mine = comfyui.sample(make_run("stage_c", model, prompts, RunToZero, **plain)).latent
    theirs = only(nodes.KSampler().sample(model, SEED, steps, cfg, "ddim", "simple", *prompts, latent))
    results = {"ddim against KSampler": relative(theirs["samples"], mine)}

    rescaled = {**plain, "cfg_rescale": 0.7}
    mine = comfyui.sample(make_run("stage_c", model, prompts, RunToZero, **rescaled)).latent
    guided = only(scheduling.CascadeGuidance.execute(model, 0.7, 2.0))
    theirs = only(nodes.KSampler().sample(guided, SEED, steps, cfg, "ddim", "simple", *prompts, latent))
    results["CascadeGuidance in KSampler"] = relative(theirs["samples"], mine)

    guider = comfy.samplers.CFGGuider(guided)
    guider.set_conds(*prompts)
    guider.set_cfg(cfg)
    sigmas = only(scheduling.CascadeScheduler.execute(steps, 2.0, 1.0, True))
    noise = nodes_custom_sampler.Noise_RandomNoise(SEED)
    custom = nodes_custom_sampler.SamplerCustomAdvanced
    run = custom.execute if hasattr(custom, "execute") else custom().sample
    theirs = only(run(noise, guider, comfy.samplers.sampler_object("ddim"), sigmas, latent))
    results["CascadeScheduler in SamplerCustomAdvanced"] = relative(theirs["samples"], mine)
    return results


def measure() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        loaded = load(native.wide_stage_c(Path(folder)))
    clip = comfyui.load_text_encoder(WEIGHTS / "demo_text_encoder")
    positive, negative = encode(OURS, clip)
    semantic = torch.randn(1, 16, 6, 6)
    with_prior = nodes_stable_cascade.StableCascade_StageB_Conditioning.execute
    zeros = {"samples": torch.zeros_like(semantic)}
    prompts = {
        "stage_c": (positive, negative),
        "stage_b": (only(with_prior(positive, {"samples": semantic})), only(with_prior(negative, zeros))),
    }
    return {
        **samplers(loaded, prompts),
        **{
            f"{name}, MODEL {program}": value
            for program in WHO
            for name, value in against_native_sampling(loaded[program]["stage_c"], prompts["stage_c"]).items()
        },
        **native_latents(loaded[OURS], prompts["stage_c"]),
        **matrix(loaded, clip),
    }
