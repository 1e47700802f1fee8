"""CLIP without ComfyUI: the core's text encoder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ....cascade_core.errors import CascadeError
from ....cascade_core.stages.prompt import TextStage
from ....cascade_core.stages.prompt import load_text_encoder as load
from .device import compute_device
from .embeddings import embeddings_in
from .values import words_for


def load_text_encoder(path: Path) -> TextStage:
    return load(path, compute_device())


def encode_texts(clip: Any, prompts: Sequence[str]) -> list[list]:
    if not isinstance(clip, TextStage):
        raise CascadeError(f"The CLIP is {words_for(clip)}; connect Load Cascade Text Encoder.")
    encoded = clip.encode_each([[prompt] for prompt in prompts], embeddings_in)
    return [[[each.states, {"pooled_output": each.pooled}]] for each in encoded]
