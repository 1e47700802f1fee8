"""The contents of a LoRA file, whatever dialect it was written in.

Modules go by our own names, which are the published ones with the attention input split: Stage C's
("down_blocks.0.2.attention.attn.to_q") and, for the text encoder, transformers' ("text_model.encoder.layers.0.mlp.fc1",
"text_projection").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from torch import Tensor

from ..checkpoints.files import FLOATING
from ..text.learned_tokens import LearnedToken


@dataclass(frozen=True)
class LowRank:
    """Low-rank change of one layer: ΔW = (alpha / rank) · up @ down (Hu et al. 2021, arXiv 2106.09685).

    down: (rank, c_in) or (rank, c_in, k, k); up: (c_out, rank) or (c_out, rank, 1, 1)
    alpha None: the rank, so ΔW = up @ down
    magnitude: DoRA's (Liu et al. 2024, arXiv 2402.09353), or None: W' = magnitude · (W + ΔW) / ‖W + ΔW‖, the norm over
    each row (magnitude (c_out, 1)) or over each column ((1, c_in)), whichever the magnitude's shape says.

    A depthwise convolution, whose weight is (C, 1, k, k), has up (C, rank, 1, 1) and down (rank, 1, k, k), or as
    OneTrainer trains it, up (1, rank, 1, 1) and down (rank, C, k, k).
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

    @property
    def delta_shape(self) -> tuple[int, ...]:
        """The shape that `up` and `down` make: the weight's, but for OneTrainer's depthwise form."""
        return (len(self.up), *self.down.shape[1:])

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether this can change a weight of that shape."""
        rows, columns = self.up.shape[0], self.down[0].numel()
        matrix = (shape[0], prod(shape[1:]))
        return (rows, columns) == matrix or (rows, self.down.shape[1], columns) == (1, shape[0], prod(shape))

    def delta(self, shape: Sequence[int] | None = None) -> Tensor:
        """ΔW in float32, of the weight's shape, or else of `delta_shape`."""
        change = self.scale * (self.up.float().flatten(1) @ self.down.float().flatten(1))
        return change.reshape(shape or self.delta_shape)


def belong_together(down: Tensor, up: Tensor) -> bool:
    """Whether two tensors of a file have the shapes and types of one low-rank change."""
    shaped = {down.ndim, up.ndim} <= {2, 4} and down.numel() > 0 and up.numel() > 0
    return shaped and up[0].numel() == len(down) and down.dtype in FLOATING and up.dtype in FLOATING


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
