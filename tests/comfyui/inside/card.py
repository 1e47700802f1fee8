"""Networks of the published widths on a device: estimated against measured memory, results with partly loaded
weights, and results with the engine.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import native
import torch
from comparing import relative
from interop import make_run, only
from published import free, random_weights, with_prior
from torch import Tensor

import nodes
from cascade_nodes.cascade_core.checkpoints import write_safetensors
from cascade_nodes.nodes.hosts import comfyui
from cascade_nodes.nodes.hosts.comfyui import model as hosted
from cascade_nodes.nodes.hosts.comfyui.patcher import BATCH_MARGIN

MANIFESTS = {
    "stage_c": "stage_c_1b",
    "stage_b": "stage_b_700m",
    "stage_a": "stage_a",
    "compressor": "effnet_encoder",
    "previewer": "previewer",
}
LATENTS = {
    "stage_c": {
        "1024 px": (1, 16, 24, 24),
        "1024 px, 4 pictures": (4, 16, 24, 24),
        "2048 px": (1, 16, 48, 48),
    },
    "stage_b": {
        "1024 px": (1, 4, 256, 256),
        "1024 px, 2 pictures": (2, 4, 256, 256),
        "2048 px": (1, 4, 512, 512),
    },
}
TOKENS, TEXT_WIDTH = 77, 1280
STEPS, MEASURED = 3, 10
DTYPE = "bf16"  # what random weights make of Stage B does not fit fp16, ComfyUI's own choice for it


def write_files(folder: Path) -> dict[str, Path]:
    files = {kind: folder / f"random_{kind}.safetensors" for kind in MANIFESTS}
    for kind, manifest in MANIFESTS.items():
        write_safetensors(files[kind], random_weights(manifest), {})
    return files


def make_prompts() -> dict[str, Any]:
    """Random text as the encoder gives it; for Stage B with a random prior."""
    plain = tuple(
        [[torch.randn(1, TOKENS, TEXT_WIDTH), {"pooled_output": torch.randn(1, TEXT_WIDTH)}]]
        for _ in range(2)
    )
    return {"stage_c": plain, "stage_b": with_prior(plain)}


def sample(kind: str, model: Any, prompts: Any, shape: tuple[int, ...]) -> Tensor:
    run = make_run(kind, model, prompts, steps=STEPS, latent=torch.zeros(shape), cfg_rescale=0.7)
    return comfyui.sample(run).latent


def run_ksampler(kind: str, model: Any, prompts: Any, shape: tuple[int, ...], steps: int) -> Tensor:
    latent = {"samples": torch.zeros(shape)}
    sampled = only(nodes.KSampler().sample(model, 5, steps, 2.0, "ddim", "simple", *prompts, latent))
    return sampled["samples"].float()


def ksample(kind: str, model: Any, prompts: Any, shape: tuple[int, ...]) -> Tensor:
    return run_ksampler(kind, model, prompts, shape, STEPS)


SAMPLERS = {"ours": sample, "KSampler": ksample}


def peak_bytes(device: torch.device, call: Callable[[], Any]) -> int:
    """Peak of the device's memory during a call, beyond what was allocated before."""
    call()  # what libraries keep for themselves is taken now
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def against(estimate: float, peak: int) -> dict[str, float]:
    return {"estimate_mib": estimate / 2**20, "peak_mib": peak / 2**20, "estimate_over_peak": estimate / peak}


def estimates(files: dict[str, Path], prompts: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Estimated and measured memory of both samplers and of the VAEs, each with its weights on the device.

    Without the engine, since its graphs hold their memory all the time, and a run's peak would not show it.
    """
    device = comfy.model_management.get_torch_device()
    results = {}
    for kind, shapes in LATENTS.items():
        model = without_engine(comfyui.load_network(kind, files[kind], DTYPE))
        for size, shape in shapes.items():
            peak = peak_bytes(device, lambda m=model, k=kind, s=shape: sample(k, m, prompts[k], s))
            conditions = {"clip_text": [[1, TOKENS, TEXT_WIDTH]], "clip_img": [[1, 1, 768]]}
            estimate = model.model.memory_required([2 * shape[0], *shape[1:]], cond_shapes=conditions)
            results[f"{kind}, {size}"] = against(estimate, peak)
        free()
    for side in (1024, 2048):
        results |= of_vaes(files, device, side)
    return results


def of_vaes(files: dict[str, Path], device: torch.device, side: int) -> dict[str, dict[str, float]]:
    stage_a = comfyui.load_stage_a(files["stage_a"])
    coder = comfyui.load_compressor(files["compressor"], files["previewer"])
    picture = torch.rand(1, side, side, 3)
    pixels, latent_b, latent_c = (
        (1, 3, side, side),
        (1, 4, side // 4, side // 4),
        (1, 16, side // 32, side // 32),
    )
    calls = {
        "stage_a decode": (
            stage_a.memory_used_decode,
            latent_b,
            lambda: stage_a.decode(torch.randn(latent_b)),
        ),
        "stage_a encode": (stage_a.memory_used_encode, pixels, lambda: stage_a.encode(picture)),
        "compressor": (coder.memory_used_encode, pixels, lambda: coder.encode(picture)),
        "previewer": (coder.memory_used_decode, latent_c, lambda: coder.decode(torch.randn(latent_c))),
    }
    results = {
        f"{name}, {side} px": against(memory(shape, stage_a.vae_dtype), peak_bytes(device, call))
        for name, (memory, shape, call) in calls.items()
    }
    free()
    return results


def without_engine(model: Any) -> Any:
    plain = model.clone()
    plain.model_options["transformer_options"][hosted.ENGINE] = False
    return plain


def with_engine(files: dict[str, Path], prompts: dict[str, Any]) -> dict[str, Any]:
    """Both samplers with the engine against without it; seconds of so many steps, ComfyUI's own network beside ours."""
    device = comfy.model_management.get_torch_device()
    results: dict[str, Any] = {}
    for kind, shapes in LATENTS.items():
        shape = shapes["1024 px"]
        model = comfyui.load_network(kind, files[kind], DTYPE)
        models = {
            "ours": model,
            "ours, no engine": without_engine(model),
            "ComfyUI's": native.model(kind, files[kind], torch.bfloat16),
        }
        sampled = {
            (sampler, name): run(kind, of, prompts[kind], shape)
            for sampler, run in SAMPLERS.items()
            for name, of in models.items()
            if name != "ComfyUI's"
        }
        for sampler in SAMPLERS:
            pair = sampled[sampler, "ours"], sampled[sampler, "ours, no engine"]
            results[f"{kind}, {sampler}: engine against none"] = relative(*pair)
        bound = model.model.diffusion_model.engine._bound is not None
        results[f"{kind}: engine used"] = bound
        for name, of in models.items():
            run_ksampler(kind, of, prompts[kind], shape, STEPS)
            torch.cuda.synchronize(device)
            began = time.perf_counter()
            run_ksampler(kind, of, prompts[kind], shape, MEASURED)
            torch.cuda.synchronize(device)
            results[f"{kind}: ms a step of KSampler, {name}"] = (
                (time.perf_counter() - began) / MEASURED * 1000
            )
        free()
    return results


def in_part(files: dict[str, Path], prompts: dict[str, Any]) -> dict[str, Any]:
    """Compares each sampler with all weights on the device, with room for half of them, and for none: to the bit."""
    management = comfy.model_management
    device = management.get_torch_device()
    results = {}
    for kind, shapes in LATENTS.items():
        model = comfyui.load_network(kind, files[kind], DTYPE)
        shape, size = shapes["1024 px"], model.model_size()
        whole = {name: run(kind, model, prompts[kind], shape) for name, run in SAMPLERS.items()}
        shares = {"whole": model.loaded_size() / size}
        forward = model.model.memory_required([2 * shape[0], *shape[1:]])
        for part in (0.5, 0.0):
            # Both prompts at once need more than a forward.
            room = part * size + max(BATCH_MARGIN * forward, management.minimum_inference_memory())
            for name, run in SAMPLERS.items():
                free()
                reserved = management.EXTRA_RESERVED_VRAM
                management.EXTRA_RESERVED_VRAM = management.get_free_memory(device) - room
                sampled = run(kind, model, prompts[kind], shape)
                management.EXTRA_RESERVED_VRAM = reserved
                shares[f"{name}, {part:g}"] = model.loaded_size() / size
                results[f"{kind}, {name}, {part:g}: in part against whole"] = relative(sampled, whole[name])
        results |= {
            f"{kind}, {name}: share of the weights on the device": share for name, share in shares.items()
        }
        free()
    return results


def measure() -> dict[str, Any]:
    prompts = make_prompts()
    with tempfile.TemporaryDirectory() as name:
        files = write_files(Path(name))
        return {
            "in part": in_part(files, prompts),
            "engine": with_engine(files, prompts),
            "estimates": estimates(files, prompts),
        }
