"""Files of the published widths with random weights: Stage C 1 B all-in-one with CLIP bigG, Stage B 0.7 B by itself.

ComfyUI's own loaders and text encoder know these widths only.
"""

import gc
import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_extras import nodes_stable_cascade
from comparing import relative
from interop import encode, make_run, only
from torch import Tensor

import nodes
from cascade_nodes.cascade_core.checkpoints import LAYOUTS, fuse_attention, write_safetensors
from cascade_nodes.nodes import loaders
from cascade_nodes.nodes.hosts import comfyui

MANIFESTS = Path(__file__).parents[2] / "golden" / "checkpoint_manifests.json.gz"
AIO, STAGE_B = "random_stage_c.safetensors", "random_stage_b.safetensors"
PARTS = {
    "stage_c": "stage_c_1b",
    "compressor": "effnet_encoder",
    "previewer": "previewer",
    "text": "text_encoder_clip_bigg",
    "vision": "image_encoder_clip_vit_l14",
}
SPREAD = 0.02
STEPS = 2


def random_weights(manifest: str) -> dict[str, Tensor]:
    """bf16, normal; norms about 1. One block of numbers serves all, since drawing 2 billion takes a minute."""
    shapes = json.loads(gzip.decompress(MANIFESTS.read_bytes()))[manifest]
    block = torch.randn(1 << 24).mul_(SPREAD).bfloat16()
    tensors = {}
    for name, (dtype, shape) in shapes.items():
        if not getattr(torch, dtype).is_floating_point:
            tensors[name] = torch.zeros(shape, dtype=getattr(torch, dtype))
            continue
        count = torch.Size(shape).numel()
        values = block.repeat(-(-count // len(block)))[:count].reshape(shape)
        one = name.endswith("running_var") or ("norm" in name and name.endswith("weight"))
        tensors[name] = (values + 1).abs() if one else values
    return tensors


def write_files(folder: Path) -> None:
    """Into ComfyUI's folders of checkpoints and diffusion models."""
    tensors: dict[str, Tensor] = {}
    for part, manifest in PARTS.items():
        weights = LAYOUTS[part][0].from_published(random_weights(manifest))
        tensors |= fuse_attention(weights) if part == "stage_c" else weights
    write_safetensors(folder / AIO, tensors, {})
    write_safetensors(folder / STAGE_B, random_weights("stage_b_700m"), {})
    for category in ("checkpoints", "diffusion_models"):
        folder_paths.add_model_folder_path(category, str(folder))


def sample(kind: str, model: Any, prompts: Any) -> Tensor:
    run = make_run(kind, model, prompts, steps=STEPS, samples=LATENTS[kind], cfg_rescale=0.7)
    return comfyui.sample(run).samples


LATENTS = {"stage_c": torch.zeros(1, 16, 6, 6), "stage_b": torch.zeros(1, 4, 64, 64)}


def stage_c() -> tuple[dict[str, float], Any]:
    """The all-in-one by ComfyUI's loader and by ours: text, sampling, compressor; the prompts for Stage B."""
    model, clip, vae = nodes.CheckpointLoaderSimple().load_checkpoint(AIO)[:3]
    ours, our_clip, our_vae, vision = loaders.CascadeCheckpointLoader.execute(AIO, "auto").result
    prompts = {"native": encode("native", clip), "ours": encode("ours", our_clip)}
    image = torch.rand(1, 256, 256, 3)
    encoder = nodes_stable_cascade.StableCascade_StageC_VAEEncode
    latents = [only(encoder.execute(image, one, 42))["samples"] for one in (vae, our_vae)]
    sampled = {
        "native": sample("stage_c", model, prompts["native"]),
        "ours": sample("stage_c", ours, prompts["native"]),
    }
    empty = only(nodes_stable_cascade.StableCascade_EmptyLatentImage.execute(256, 256, 42))
    ksampled = [
        only(nodes.KSampler().sample(one, 5, STEPS, 2.0, "ddim", "simple", *prompts["native"], empty))[
            "samples"
        ]
        for one in (model, ours)
    ]
    embeds = only(nodes.CLIPVisionEncode().encode(vision, image, "center")).image_embeds
    assert embeds.shape == (1, 768), embeds.shape
    (text, pooled), (our_text, our_pooled) = (
        (prompts[who][0][0][0], prompts[who][0][0][1]["pooled_output"]) for who in ("native", "ours")
    )
    return {
        "text states": relative(our_text, text),
        "pooled text": relative(our_pooled, pooled),
        "compressor": relative(latents[1], latents[0]),
        "Stage C, our sampler": relative(sampled["ours"], sampled["native"]),
        "Stage C, KSampler": relative(ksampled[1], ksampled[0]),
    }, prompts["native"]


def stage_b(prompts: Any) -> dict[str, float]:
    """Stage B by UNETLoader and by ours."""
    with_prior = nodes_stable_cascade.StableCascade_StageB_Conditioning.execute
    semantic = {"samples": torch.randn(1, 16, 6, 6)}
    zeros = {"samples": torch.zeros(1, 16, 6, 6)}
    prompts = only(with_prior(prompts[0], semantic)), only(with_prior(prompts[1], zeros))
    native = only(nodes.UNETLoader().load_unet(STAGE_B, "default"))
    reference = sample("stage_b", native, prompts)
    ours = only(loaders.StageBLoader.execute(STAGE_B, "auto"))
    return {"Stage B, our sampler": relative(sample("stage_b", ours, prompts), reference)}


def measure() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        write_files(Path(name))
        gc.collect()
        results, prompts = stage_c()
        gc.collect()
        return {**results, **stage_b(prompts)}
