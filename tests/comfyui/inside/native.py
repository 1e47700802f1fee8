"""ComfyUI's own classes at the demo's size, with the demo's weights."""

import json
from pathlib import Path
from typing import Any

import comfy.ldm.cascade.stage_a
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import torch
from torch import nn

from cascade_nodes.cascade_core import checkpoints
from cascade_nodes.demo.pipeline import WEIGHTS

CONFIGS = {
    "stage_c": comfy.supported_models.Stable_Cascade_C,
    "stage_b": comfy.supported_models.Stable_Cascade_B,
}
IMAGE_WIDTH = 768  # what ComfyUI's own Stage C always gets


def wide_stage_c(folder: Path) -> Path:
    """The demo's Stage C with an image input as wide as ComfyUI's own class expects it; its weights are random."""
    tensors, metadata = checkpoints.read_safetensors(WEIGHTS / "demo_stage_c.safetensors")
    config = json.loads(metadata["config"]) | {"c_clip_img": IMAGE_WIDTH}
    old = tensors["clip_img_mapper.weight"]
    tensors["clip_img_mapper.weight"] = torch.randn(len(old), IMAGE_WIDTH).mul(0.02).to(old.dtype)
    path = folder / "stage_c.safetensors"
    checkpoints.write_safetensors(path, tensors, metadata | {"config": json.dumps(config)})
    return path


def model(kind: str, path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A MODEL as ComfyUI's own loaders make one, around ComfyUI's own network."""
    ours, _, config = checkpoints.load_model(path, expect=kind, dtype=dtype)
    model_config = CONFIGS[kind](dict(config))
    model_config.set_inference_dtype(dtype, None)
    base = model_config.get_model({}, device="cpu")
    base.diffusion_model.load_state_dict(ours.state_dict(), strict=True)
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    load_device = comfy.model_management.get_torch_device()
    return patcher(base, load_device=load_device, offload_device=torch.device("cpu"))


def vae() -> Any:
    """A VAE as ComfyUI makes one of a Stage A file, with a network of the demo's size."""
    ours, _, config = checkpoints.load_model(WEIGHTS / "demo_stage_a.safetensors", dtype=torch.float32)
    names = ("levels", "bottleneck_blocks", "c_hidden", "c_latent", "codebook_size")
    network = comfy.ldm.cascade.stage_a.StageA(**{name: config[name] for name in names})
    network.load_state_dict(ours.state_dict(), strict=True)
    # Detected by its codebook, then filled with the published size: the network is put in its place.
    value = comfy.sd.VAE(sd=published_stage_a().state_dict())
    value.first_stage_model = network.eval()
    value.patcher = comfy.model_patcher.ModelPatcher(
        network, load_device=value.device, offload_device=torch.device("cpu")
    )
    return value


def published_stage_a() -> nn.Module:
    """A random Stage A of the published size, only to be recognised."""
    return comfy.ldm.cascade.stage_a.StageA()
