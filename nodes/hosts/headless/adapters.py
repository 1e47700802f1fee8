"""LoRAs and learned tokens without ComfyUI: kept beside the shared weights, applied while those are used."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ....cascade_core.adapters import Adapter
from ....cascade_core.adapters.apply import Patch
from ....cascade_core.adapters.tokens import NewToken, taught_tokens
from ....cascade_core.errors import CascadeError
from ....cascade_core.networks.config import StageCConfig
from .clip import HeadlessCLIP
from .model import HeadlessModel


def stage_c_config(model: HeadlessModel) -> StageCConfig:
    return model.network.config


def text_network(clip: Any) -> nn.Module:
    if not isinstance(clip, HeadlessCLIP):
        raise CascadeError(f"The CLIP is a {type(clip).__name__}; connect Load Cascade Text Encoder.")
    return clip.encoder.model


def with_adapter(
    model: HeadlessModel,
    clip: HeadlessCLIP | None,
    adapter: Adapter,
    strength_model: float,
    strength_clip: float,
    new: Sequence[NewToken],
) -> tuple[HeadlessModel, HeadlessCLIP | None]:
    if strength_model:
        model = replace(model, patches=(*model.patches, Patch(adapter.name, adapter.stage_c, strength_model)))
    if clip is not None and strength_clip:
        network: Any = text_network(clip)
        vocabulary = clip.encoder.tokenizer.backend.get_vocab()
        embedding = network.get_input_embeddings().weight
        taught = taught_tokens(adapter, strength_clip, vocabulary, embedding, new)
        patch = Patch(adapter.name, adapter.text, strength_clip)
        clip = replace(clip, patches=(*clip.patches, patch), learned=(*clip.learned, *taught))
    return model, clip
