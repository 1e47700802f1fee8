"""CLIP without ComfyUI: the core's text encoder."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ....cascade_core.adapters import LearnedToken
from ....cascade_core.adapters.apply import Patch
from ....cascade_core.errors import CascadeError
from ....cascade_core.networks import activations
from .device import compute_device, on_device
from .embeddings import embeddings_in
from .weights import naming_non_finite

if TYPE_CHECKING:
    from ....cascade_core.text.encoder import TextEncoder


@dataclass(frozen=True)
class HeadlessCLIP:
    """A text encoder with its tokenizer. What LoRAs change of it is kept beside it: others share the encoder."""

    encoder: "TextEncoder"
    file: str
    patches: tuple[Patch, ...] = ()
    learned: tuple[LearnedToken, ...] = ()

    def networks(self) -> list[tuple[nn.Module, str]]:
        """The network with the name of its file."""
        return [(self.encoder.model, self.file)]


def load_text_encoder(path: Path) -> HeadlessCLIP:
    from ....cascade_core.text.encoder import TextEncoder  # transformers takes seconds to import

    return HeadlessCLIP(TextEncoder.load(path, dtype=encoder_dtype()), path.name)


@torch.inference_mode()
def encode_text(clip: HeadlessCLIP, prompt: str) -> list:
    if not isinstance(clip, HeadlessCLIP):
        raise CascadeError(f"The CLIP is a {type(clip).__name__}; connect Load Cascade Text Encoder.")
    model = clip.encoder.model
    learned = [*clip.learned, *embeddings_in(prompt, model.config.hidden_size)]
    # Its chunks, and the empty one that weights need.
    rows = len(clip.encoder.tokenizer.chunks(prompt)) + 1
    values = activations.clip_encoder(model.config, rows, clip.encoder.tokenizer.length)

    def encode(_: torch.device) -> list:
        states, pooled = clip.encoder.encode([prompt], learned)
        return [[states.cpu(), {"pooled_output": pooled.cpu()}]]

    with naming_non_finite(clip):
        return on_device(model, encode, values * model.dtype.itemsize, clip.patches, once=True)


def encoder_dtype() -> torch.dtype:
    """float32 on the CPU, where halves are slow; else half precision, which the encoders were published
    in.
    """
    return torch.float32 if compute_device().type == "cpu" else torch.float16
