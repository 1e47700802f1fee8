"""The text-to-image graph as plain calls of the nodes."""

from typing import Any

import torch

from cascade_nodes.nodes.conditioning import CascadeTextEncode
from cascade_nodes.nodes.latents import CascadeDecode, CascadeEmptyLatent
from cascade_nodes.nodes.loaders import (
    CascadeTextEncoderLoader,
    StageAVAE,
    StageBLoader,
    StageCLoader,
)
from cascade_nodes.nodes.sampling import CascadeDecoderSampler, CascadePriorSampler

PRIOR = {"steps": 4, "cfg": 3.0, "cfg_rescale": 0.7, "shift": 2.0, "sampler": "ddpm", "denoise": 1.0}
DECODER = {"steps": 3, "cfg": 1.1, "cfg_rescale": 0.7, "shift": 1.0, "sampler": "ddpm", "denoise": 1.0}


def load() -> dict[str, Any]:
    """The tiny cascade's sockets."""
    return {
        "stage_c": StageCLoader.execute("tiny_stage_c.safetensors", "auto")[0],
        "stage_b": StageBLoader.execute("tiny_stage_b.safetensors", "auto")[0],
        "stage_a": StageAVAE.execute("tiny_stage_a.safetensors")[0],
        "clip": CascadeTextEncoderLoader.execute("tiny_text_encoder")[0],
    }


def text_to_image(
    sockets: dict[str, Any],
    prompt: str = "a (red:1.2) star",
    negative: str = "blue",
    size: tuple[int, int] = (96, 64),
    batch: int = 1,
    seed: int = 5,
    **prior: Any,
) -> dict[str, torch.Tensor]:
    """{"image", "stage_c", "stage_b"}"""
    positive, unwanted = CascadeTextEncode.execute(sockets["clip"], prompt, negative).args
    stage_c, stage_b = CascadeEmptyLatent.execute(*size, batch, 42.67).args
    settings = {**PRIOR, **prior}
    stage_c = CascadePriorSampler.execute(
        sockets["stage_c"], positive, unwanted, stage_c, seed=seed, **settings
    )[0]
    stage_b = CascadeDecoderSampler.execute(
        sockets["stage_b"], positive, unwanted, stage_c, stage_b, seed=seed, **DECODER
    )[0]
    image = CascadeDecode.execute(sockets["stage_a"], stage_b, 0)[0]
    return {"image": image, "stage_c": stage_c["samples"], "stage_b": stage_b["samples"]}
