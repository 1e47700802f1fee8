"""MODEL without ComfyUI: a network of ours, and what it was loaded from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....cascade_core import checkpoints
from ..run import LATENT_CHANNELS, Network
from .device import weight_dtype

WIDTHS = {
    "stage_c": {"text": "c_clip_text", "pooled": "c_clip_text_pooled", "image": "c_clip_img"},
    "stage_b": {"pooled": "c_clip"},
}


@dataclass(frozen=True)
class HeadlessModel:
    """A diffusion network in evaluation mode, in main memory."""

    kind: str
    name: str
    network: Any  # StageB or StageC


def load_network(kind: str, path: Path, dtype: str) -> HeadlessModel:
    network, kind, _ = checkpoints.load_model(path, expect=kind, dtype=weight_dtype(dtype))
    return HeadlessModel(kind, path.name, network)


def describe_network(model: Any) -> Network:
    if not isinstance(model, HeadlessModel):
        return Network(None, f"a {type(model).__name__}", {})
    config = model.network.config
    widths = {what: getattr(config, field) for what, field in WIDTHS[model.kind].items()}
    name = f"{model.name} ({checkpoints.KIND_NAMES[model.kind]})"
    return Network(model.kind, name, widths, getattr(config, "c_in", LATENT_CHANNELS[model.kind]))


def first_non_finite(model: HeadlessModel) -> str | None:
    return checkpoints.first_non_finite(model.network)
