"""LoRAs and learned tokens without ComfyUI: kept beside the shared weights, applied while those are used."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ....cascade_core.adapters import Adapter
from ....cascade_core.adapters.apply import Patch
from ....cascade_core.adapters.tokens import NewToken
from ....cascade_core.errors import CascadeError
from ....cascade_core.networks.config import StageBConfig, StageCConfig
from ....cascade_core.stages.diffusion import DiffusionStage
from ....cascade_core.stages.prompt import TextStage
from .values import words_for


def stage_config(model: DiffusionStage) -> StageCConfig | StageBConfig:
    return model.network.config


def text_network(clip: Any) -> nn.Module:
    if not isinstance(clip, TextStage):
        raise CascadeError(f"The CLIP is {words_for(clip)}; connect Load Cascade Text Encoder.")
    return clip.encoder.model


def with_adapter(
    model: DiffusionStage,
    clip: TextStage | None,
    adapter: Adapter,
    strength_model: float,
    strength_clip: float,
    new_tokens: Sequence[NewToken],
) -> tuple[DiffusionStage, TextStage | None]:
    if strength_model:
        model = replace(
            model, patches=(*model.patches, Patch(adapter.name, adapter.diffusion, strength_model))
        )
    if clip is not None and strength_clip:
        text_network(clip)  # refuses what is not a CLIP
        clip = clip.with_adapter(adapter, strength_clip, new_tokens)
    return model, clip
