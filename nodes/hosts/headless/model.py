"""MODEL without ComfyUI: a stage of the core."""

from pathlib import Path
from typing import Any

from ....cascade_core.geometry import LATENT_CHANNELS
from ....cascade_core.stages.diffusion import DiffusionStage, load_stage, min_latent_side
from ..run import NetworkDescription
from .device import compute_device
from .values import words_for

WIDTHS = {
    "stage_c": {"text": "c_clip_text", "pooled": "c_clip_text_pooled", "image": "c_clip_img"},
    "stage_b": {"pooled": "c_clip"},
}


def load_network(kind: str, path: Path, dtype: str) -> DiffusionStage:
    return load_stage(kind, path, dtype, compute_device())


def describe_network(model: Any) -> NetworkDescription:
    if not isinstance(model, DiffusionStage):
        return NetworkDescription(None, words_for(model), {})
    config = model.network.config
    widths = {side: getattr(config, field) for side, field in WIDTHS[model.kind].items()}
    channels = getattr(config, "c_in", LATENT_CHANNELS[model.kind])
    least = min_latent_side(model.kind, config)
    return NetworkDescription(model.kind, model.described, widths, channels, least)
