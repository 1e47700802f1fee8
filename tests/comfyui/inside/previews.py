"""What is shown while sampling: the picture of a learned previewer where there is one, else ComfyUI's approximation."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import comfy.utils
import folder_paths
import native
import torch
from comfy.cli_args import LatentPreviewMethod, args
from interop import encode, make_run
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from cascade_nodes.cascade_core import checkpoints
from cascade_nodes.demo.pipeline import WEIGHTS
from cascade_nodes.nodes.hosts import comfyui

STEPS = 3


def shown(kind: str, model: Any, prompts: Any) -> tuple[list[Image.Image], torch.Tensor]:
    """The previews of a run, and the latent that comes of it."""
    previews = []
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, preview, **rest: previews.append(preview[1]) if preview else None
    )
    sampled = comfyui.sample(make_run(kind, model, prompts, steps=STEPS)).latent
    comfy.utils.set_progress_bar_global_hook(None)
    return previews, sampled


def difference(preview: Image.Image, picture: torch.Tensor) -> float:
    """Of 255, the largest between a preview, made of the last step's clean latent, and the result's picture."""
    return (pil_to_tensor(preview) - picture[0].clamp(0, 1) * 255).abs().max().item()


def measure() -> dict[str, Any]:
    args.preview_method = LatentPreviewMethod.Auto
    prompts = encode("ours", comfyui.load_text_encoder(WEIGHTS / "demo_text_encoder"))
    networks = {
        name: checkpoints.load_model(WEIGHTS / f"demo_{name}.safetensors", dtype=torch.float32)[0]
        for name in ("previewer", "stage_a")
    }
    pictures: dict[str, Any] = {"stage_c": networks["previewer"], "stage_b": networks["stage_a"].decode}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wide = comfyui.load_network("stage_c", native.wide_stage_c(folder), "fp32")  # no file of the demo's
        for kind, picture in pictures.items():
            model = comfyui.load_network(kind, WEIGHTS / f"demo_{kind}.safetensors", "fp32")
            previews, sampled = shown(kind, model, prompts)
            units = 0.43 if kind == "stage_b" else 1.0
            results[f"{kind}, learned"] = difference(previews[-1], picture(sampled / units))
            results[f"{kind}, previews"] = len(previews)
        results["without a file"] = list(shown("stage_c", wide, prompts)[0][-1].size)
        (folder / "vae").mkdir()
        shutil.copy(WEIGHTS / "demo_previewer.safetensors", folder / "vae" / "any_name.safetensors")
        folder_paths.add_model_folder_path("vae", str(folder / "vae"))
        previews, sampled = shown("stage_c", wide, prompts)
        results["with a file"] = list(previews[-1].size)
        results["with a file, learned"] = difference(previews[-1], networks["previewer"](sampled))
    return results
