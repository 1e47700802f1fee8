"""MODEL without ComfyUI: a network of ours, and what it was loaded from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ....cascade_core import checkpoints
from ....cascade_core.adapters.apply import Patch
from ....cascade_core.engine import Engine
from ....cascade_core.geometry import LATENT_CHANNELS
from ....cascade_core.networks.fp16 import scale_residual_stream
from ..run import Network, least_side
from .device import engine_precision, read_ahead, weight_dtype

WIDTHS = {
    "stage_c": {"text": "c_clip_text", "pooled": "c_clip_text_pooled", "image": "c_clip_img"},
    "stage_b": {"pooled": "c_clip"},
}


@dataclass(frozen=True)
class HeadlessModel:
    """A diffusion network in evaluation mode, in main memory or on the device.

    What LoRAs change of it is kept beside it: others share the network.
    """

    kind: str
    name: str
    network: Any  # StageB or StageC
    engine: Engine  # called in the network's place
    patches: tuple[Patch, ...] = ()

    def networks(self) -> list[tuple[nn.Module, str]]:
        """Each network with the name of its file."""
        return [(self.network, self.described)]

    @property
    def described(self) -> str:
        """The file and what it holds, in words."""
        return f"{self.name} ({checkpoints.KIND_NAMES[self.kind]})"


def load_network(kind: str, path: Path, dtype: str) -> HeadlessModel:
    precision = weight_dtype(dtype)
    network: Any  # StageB or StageC
    network, kind, _ = checkpoints.load_model(path, expect=kind, dtype=precision, read_ahead=read_ahead())
    if kind == "stage_c" and precision == torch.float16:
        scale_residual_stream(network)
    engine = Engine(network, join=True, precision=engine_precision(dtype))
    return HeadlessModel(kind, path.name, network, engine)


def describe_network(model: Any) -> Network:
    if not isinstance(model, HeadlessModel):
        return Network(None, f"a {type(model).__name__}", {})
    config = model.network.config
    widths = {what: getattr(config, field) for what, field in WIDTHS[model.kind].items()}
    channels = getattr(config, "c_in", LATENT_CHANNELS[model.kind])
    return Network(model.kind, model.described, widths, channels, least_side(model.kind, config))
