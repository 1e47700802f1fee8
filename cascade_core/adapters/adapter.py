"""The contents of a LoRA file, whatever dialect it was written in.

Layers go by our own names, which are the published ones with the attention input split: Stage C's and B's
("down_blocks.0.2.attention.attn.to_q") and, for the text encoder, transformers' ("text_model.encoder.layers.0.mlp.fc1",
"text_projection"). A layer's name stands for its weight; its other parameters go by their own ("clf.1.bias").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..text.learned_tokens import LearnedToken
from .changes import Change


@dataclass(frozen=True)
class Adapter:
    """A LoRA file.

    name      of the file, for messages
    dialect   a key of `dialects.DIALECTS`
    stage_c   changes of Stage C by layer, or parameter
    stage_b   changes of Stage B, in a file that is for it
    text      changes of the text encoder by layer, or parameter
    tokens    learned tokens
    unknown   keys of the file that are none of these
    notes     sentences about what was assumed of it
    metadata  of the file
    """

    name: str
    dialect: str
    stage_c: Mapping[str, Change] = field(default_factory=dict)
    stage_b: Mapping[str, Change] = field(default_factory=dict, kw_only=True)
    text: Mapping[str, Change] = field(default_factory=dict)
    tokens: tuple[LearnedToken, ...] = ()
    unknown: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def diffusion(self) -> Mapping[str, Change]:
        """The changes of the stage that it is for."""
        return self.stage_b or self.stage_c
