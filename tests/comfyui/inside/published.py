"""Files of the published widths with random weights: Stage C 1 B all-in-one with CLIP bigG, Stage B 0.7 B by itself.

ComfyUI's own loaders and text encoder know these widths only.
"""

import gc
import gzip
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch
from comfy_extras import nodes_stable_cascade
from comparing import relative
from interop import encode, make_run, only
from torch import Tensor

import nodes
from cascade_nodes.cascade_core.checkpoints import (
    ALL_IN_ONE,
    fuse_attention,
    layout_named,
    write_safetensors,
)
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
    """Normal values in bf16, norms about 1. One block serves all, since drawing 2 billion takes a minute."""
    shapes = json.loads(gzip.decompress(MANIFESTS.read_bytes()))[manifest]
    block = torch.randn(1 << 24).mul_(SPREAD).bfloat16()
    tensors = {}
    for name, (dtype, shape) in shapes.items():
        if not getattr(torch, dtype).is_floating_point:
            tensors[name] = torch.zeros(shape, dtype=getattr(torch, dtype))
            continue
        count = torch.Size(shape).numel()
        numbers = block if count <= len(block) else block.repeat(-(-count // len(block)))
        values = numbers[:count].clone().reshape(shape)
        one = name.endswith("running_var") or ("norm" in name and name.endswith("weight"))
        tensors[name] = (values + 1).abs() if one else values
    return tensors


@contextmanager
def files() -> Iterator[None]:
    """Writes the files into ComfyUI's folders of checkpoints and diffusion models, unless an earlier version did."""
    folder_name = os.environ.get("CASCADE_PUBLISHED")
    with nullcontext(folder_name) if folder_name else tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not (folder / STAGE_B).exists():
            write_files(folder)
        for category in ("checkpoints", "diffusion_models"):
            folder_paths.add_model_folder_path(category, name)
        yield


def write_files(folder: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for part, manifest in PARTS.items():
        weights = layout_named(part, ALL_IN_ONE).from_published(random_weights(manifest))
        tensors |= fuse_attention(weights) if part == "stage_c" else weights
    write_safetensors(folder / AIO, tensors, {})
    write_safetensors(folder / STAGE_B, random_weights("stage_b_700m"), {})


LATENTS = {"stage_c": torch.zeros(1, 16, 6, 6), "stage_b": torch.zeros(1, 4, 64, 64)}


def sample(kind: str, model: Any, prompts: Any) -> Tensor:
    run = make_run(kind, model, prompts, steps=STEPS, latent=LATENTS[kind], cfg_rescale=0.7)
    return comfyui.sample(run).latent


def stage_c(program: str, image: Tensor, prompts: Any = None) -> tuple[dict[str, Tensor], Any]:
    """What comes of the all-in-one by one side's loader, with the native prompts; and the prompts of this side."""
    if program == "native":
        model, clip, vae, *_ = nodes.CheckpointLoaderSimple().load_checkpoint(AIO)
    else:
        output: Any = loaders.CascadeCheckpointLoader.execute(AIO, "auto")
        model, clip, vae, vision = output.result
        embeds = only(nodes.CLIPVisionEncode().encode(vision, image, "center")).image_embeds
        assert embeds.shape == (1, 768), embeds.shape
    encoded = encode(program, clip)
    prompts = prompts or encoded
    states, extra = encoded[0][0]
    latent = only(nodes_stable_cascade.StableCascade_StageC_VAEEncode.execute(image, vae, 42))["samples"]
    empty = only(nodes_stable_cascade.StableCascade_EmptyLatentImage.execute(256, 256, 42))
    ksampled = only(nodes.KSampler().sample(model, 5, STEPS, 2.0, "ddim", "simple", *prompts, empty))
    return {
        "text states": states,
        "pooled text": extra["pooled_output"],
        "compressor": latent,
        "Stage C, our sampler": sample("stage_c", model, prompts),
        "Stage C, KSampler": ksampled["samples"],
    }, encoded


def stage_b(program: str, prompts: Any) -> dict[str, Tensor]:
    """Results of Stage B, loaded by UNETLoader or by ours."""
    if program == "native":
        model = only(nodes.UNETLoader().load_unet(STAGE_B, "default"))
    else:
        model = only(loaders.StageBLoader.execute(STAGE_B, "auto"))
    return {"Stage B, our sampler": sample("stage_b", model, prompts)}


def with_prior(prompts: Any) -> Any:
    add = nodes_stable_cascade.StableCascade_StageB_Conditioning.execute
    latents = {"samples": torch.randn(1, 16, 6, 6)}, {"samples": torch.zeros(1, 16, 6, 6)}
    return tuple(only(add(prompt, latent)) for prompt, latent in zip(prompts, latents, strict=True))


def free() -> None:
    """Frees one side's memory: both would need more than 24 GB."""
    comfy.model_management.unload_all_models()
    gc.collect()


def measure() -> dict[str, float]:
    image = torch.rand(1, 256, 256, 3)
    with files():
        free()
        native, prompts = stage_c("native", image)
        free()
        ours, _ = stage_c("ours", image, prompts)
        free()
        prompts = with_prior(prompts)
        native |= stage_b("native", prompts)
        free()
        ours |= stage_b("ours", prompts)
    return {name: relative(ours[name], native[name]) for name in native}
