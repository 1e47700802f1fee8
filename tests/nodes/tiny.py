"""A whole cascade of random weights, small enough that a picture takes a tenth of a second."""

import json
from pathlib import Path

import torch

from cascade_nodes.cascade_core.checkpoints import NETWORKS, write_safetensors
from cascade_nodes.cascade_core.text.encoder import build_text_model
from cascade_nodes.cascade_core.text.tokenizer import Tokenizer, build_small_vocabulary
from cascade_nodes.cascade_core.vision import build_vision_model

TEXT_WIDTH, POOLED_WIDTH, IMAGE_WIDTH = 64, 64, 48
WORDS = ["a", "the", "red", "blue", "star", "circle", "on", "small", "large"]

CONFIGS = {
    "stage_c": {
        "c_cond": 32,
        "c_hidden": [32, 32],
        "nhead": [2, 2],
        "blocks": [[1, 1], [1, 1]],
        "c_clip_text": TEXT_WIDTH,
        "c_clip_text_pooled": POOLED_WIDTH,
        "c_clip_img": IMAGE_WIDTH,
        "c_clip_seq": 2,
        "c_r": 16,
    },
    "stage_b": {
        "c_cond": 32,
        "c_hidden": [16, 32],
        "nhead": [-1, 2],
        "blocks": [[1, 1], [1, 1]],
        "block_repeat": [[1, 1], [1, 1]],
        "level_config": ["CT", "CTA"],
        "dropout": [0, 0.1],
        "self_attn": [True, True],
        "c_clip": POOLED_WIDTH,
        "c_clip_seq": 2,
        "c_r": 16,
    },
    "stage_a": {"c_hidden": 16, "bottleneck_blocks": 1, "codebook_size": 32},
    "compressor": {
        "c_latent": 16,
        "stem": 8,
        "stages": [["fused", 1, 1, 8, 1], *[["fused", 2, 2, 8, 1]] * 2, *[["mbconv", 2, 2, 16, 1]] * 2],
        "c_last": 32,
    },
    "previewer": {"c_hidden": 16},
}

FOLDERS = {
    "stage_c": "diffusion_models",
    "stage_b": "unet",
    "stage_a": "vae",
    "compressor": "stable_cascade",
    "previewer": "vae",
}

TRANSFORMER = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu"}


def write_cascade(models: Path) -> None:
    """Every network under `models`, in ComfyUI's folders, as tiny_<kind>.safetensors."""
    torch.manual_seed(11)
    for kind, config in CONFIGS.items():
        network = NETWORKS[kind].from_config(config)
        shake(network)
        save(
            models / FOLDERS[kind] / f"tiny_{kind}.safetensors",
            network,
            {"kind": kind, "config": json.dumps(config)},
        )
    write_text_encoder(models / "text_encoders" / "tiny_text_encoder")
    config = {**TRANSFORMER, "hidden_size": 64, "intermediate_size": 96, "projection_dim": IMAGE_WIDTH}
    config |= {"image_size": 28, "patch_size": 14}
    vision = build_vision_model(config).half()
    save(models / "clip_vision" / "tiny_vision.safetensors", vision, {"config": json.dumps(config)})


def write_text_encoder(folder: Path) -> None:
    """A text encoder in Hugging Face's layout and in halves, with a vocabulary of a few words."""
    vocabulary, merges = build_small_vocabulary(WORDS)
    config = {
        **TRANSFORMER,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 96,
        "projection_dim": POOLED_WIDTH,
    }
    config |= {"vocab_size": len(Tokenizer.from_vocabulary(vocabulary, merges))}
    save(folder / "model.safetensors", build_text_model(config).half(), {"config": json.dumps(config)})
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = "".join(f"{left} {right}\n" for left, right in merges)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}", encoding="utf-8")


def shake(network: torch.nn.Module) -> None:
    """Random values where a fresh network has zeros, so that every part of it shows in the output."""
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith(("gamma", "beta", "gammas")):
                tensor.normal_(std=0.3)
            elif name.endswith("running_var"):
                tensor.uniform_(0.8, 1.2)


def save(path: Path, network: torch.nn.Module, metadata: dict[str, str]) -> None:
    write_safetensors(path, network.state_dict(), metadata)
