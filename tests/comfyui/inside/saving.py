"""ComfyUI's save nodes on every network of ours, read back by our loaders and by the host without ComfyUI."""

import tempfile
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_extras import nodes_model_merging, nodes_video_model
from interop import NEGATIVE, PROMPT, make_run
from torch import Tensor

from cascade_nodes.cascade_core import checkpoints
from cascade_nodes.cascade_core.checkpoints.carried import is_carried
from cascade_nodes.demo.pipeline import WEIGHTS
from cascade_nodes.nodes.hosts import comfyui, headless

FILES = {
    "stage_c": "demo_stage_c.safetensors", "stage_b": "demo_stage_b.safetensors",
    "stage_a": "demo_stage_a.safetensors", "text": "demo_text_encoder",
    "compressor": "demo_compressor.safetensors", "previewer": "demo_previewer.safetensors",
    "vision": "demo_image_encoder.safetensors",
}  # fmt: skip
PATHS = {kind: WEIGHTS / name for kind, name in FILES.items()}


def load(host: Any, paths: dict[str, Path]) -> dict[str, Any]:
    """Every network that a host loads, from these files."""
    return {
        "stage_c": host.load_network("stage_c", paths["stage_c"], "fp32"),
        "stage_b": host.load_network("stage_b", paths["stage_b"], "fp32"),
        "stage_a": host.load_stage_a(paths["stage_a"]),
        "coder": host.load_compressor(paths["compressor"], paths["previewer"]),
        "text": host.load_text_encoder(paths["text"]),
        "vision": host.load_vision(paths["vision"]),
    }


def answers(host: Any, loaded: dict[str, Any]) -> dict[str, Tensor]:
    """What each network makes of the same input."""
    torch.manual_seed(5)
    picture, latent = torch.rand(1, 64, 64, 3), torch.randn(1, 4, 16, 16)
    texts = host.encode_texts(loaded["text"], [PROMPT, NEGATIVE])
    stage_c = {"latent": torch.zeros(1, 16, 3, 3), "steps": 2}
    prior = host.sample(make_run("stage_c", loaded["stage_c"], (texts[0], texts[1]), **stage_c)).latent
    positive, negative = (
        [[states, {**values, "stable_cascade_prior": prior}] for states, values in text] for text in texts
    )
    stage_b = {"latent": torch.zeros(1, 4, 16, 16), "steps": 2}
    return {
        "text": texts[0][0][0],
        "stage_c": prior,
        "stage_b": host.sample(
            make_run("stage_b", loaded["stage_b"], (positive, negative), **stage_b)
        ).latent,
        "stage_a, decoded": host.decode_latent(loaded["stage_a"], latent, 0),
        "stage_a, encoded": host.encode_pixels(loaded["stage_a"], picture),
        "compressor": host.encode_pixels(loaded["coder"], picture),
        "previewer": host.decode_latent(loaded["coder"], prior, 0),
        "vision": host.encode_image(loaded["vision"], picture).image_embeds,
    }


def saved(folder: Path, made: Any) -> Path:
    """The file that a save node has just written."""
    made()
    return max(folder.rglob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)


def save_apart(folder: Path, loaded: dict[str, Any]) -> dict[str, Path]:
    merging = nodes_model_merging
    coder = saved(folder, lambda: merging.VAESave().save(loaded["coder"], "coder"))
    return {
        "stage_c": saved(folder, lambda: merging.ModelSave().save(loaded["stage_c"], "c")),
        "stage_b": saved(folder, lambda: merging.ModelSave().save(loaded["stage_b"], "b")),
        "stage_a": saved(folder, lambda: merging.VAESave().save(loaded["stage_a"], "a")),
        "text": saved(folder, lambda: merging.CLIPSave().save(loaded["text"], "text")),
        "compressor": coder,
        "previewer": coder,
        "vision": PATHS["vision"],
    }


def save_together(folder: Path, loaded: dict[str, Any]) -> dict[str, Path]:
    """Saves two checkpoints, and one by the node that saves an image encoder."""
    checkpoint = nodes_model_merging.CheckpointSave()
    c, b = (
        saved(folder, lambda model=model, vae=vae: checkpoint.save(
            loaded[model], loaded["text"], loaded[vae], f"checkpoint_{model}"
        ))
        for model, vae in (("stage_c", "coder"), ("stage_b", "stage_a"))
    )  # fmt: skip
    images = nodes_video_model.ImageOnlyCheckpointSave()
    vision = saved(
        folder, lambda: images.save(loaded["stage_c"], loaded["vision"], loaded["coder"], "checkpoint_images")
    )
    return {
        "stage_c": c, "compressor": c, "previewer": c, "text": b, "stage_b": b, "stage_a": b, "vision": vision
    }  # fmt: skip


def measure() -> dict[str, Any]:
    loaded = load(comfyui, PATHS)
    hosts = {"comfyui": comfyui, "headless": headless}
    expected = {
        "comfyui": answers(comfyui, loaded),
        "headless": answers(headless, load(headless, PATHS)),
    }
    differences = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder_paths.set_output_directory(name)
        ways = {"apart": save_apart(folder, loaded), "together": save_together(folder, loaded)}
        carried = {
            way: sum(
                is_carried(key)
                for path in set(paths.values())
                for key in checkpoints.read_safetensors(path)[0]
            )
            for way, paths in ways.items()
        }
        for way, paths in ways.items():
            for name, host in hosts.items():
                found = answers(host, load(host, paths))
                for kind, tensor in found.items():
                    differences[f"{kind}, {way}, {name}"] = (tensor - expected[name][kind]).abs().max().item()
    return {"differences": differences, "carried": carried}
