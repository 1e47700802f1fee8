"""What a LoRA file holds, whatever dialect it was written in.

Modules go by our own names, which are the published ones with the attention input split: Stage C's
("down_blocks.0.2.attention.attn.to_q") and, for the text encoder, transformers' ("text_model.encoder.layers.0.mlp.fc1",
"text_projection").
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """One layer's change: ΔW = (alpha / rank) · up @ down (Hu et al. 2021, arXiv 2106.09685).

    down: (rank, c_in) or (rank, c_in, k, k); up: (c_out, rank) or (c_out, rank, 1, 1); alpha None: the rank, so ΔW = up @ down
    magnitude: DoRA's (Liu et al. 2024, arXiv 2402.09353), or None: W' = magnitude · (W + ΔW) / ‖W + ΔW‖, the norm over
    each row (magnitude (c_out, 1)) or over each column ((1, c_in)), whichever the magnitude's shape says.
    """

    down: Tensor
    up: Tensor
    alpha: float | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class LearnedToken:
    """What a file teaches about one token.

    name      in the prompt, such as "[fernando]"; "" for a change of a token that the vocabulary has
    vectors   (V, C) float32: one or more rows, which stand in the prompt one after the other
    index     the vocabulary's token that `vectors` (one row) is added to; None for a token of its own
    """

    name: str
    vectors: Tensor
    index: int | None = None


@dataclass(frozen=True)
class Adapter:
    """A LoRA file.

    name      of the file, for messages
    dialect   a key of `dialects.DIALECTS`
    stage_c   changes of Stage C by module name
    text      changes of the text encoder by module name
    tokens    learned tokens
    unknown   keys of the file that are none of these
    """

    name: str
    dialect: str
    stage_c: dict[str, LowRank] = field(default_factory=dict)
    text: dict[str, LowRank] = field(default_factory=dict)
    tokens: tuple[LearnedToken, ...] = ()
    unknown: tuple[str, ...] = ()
