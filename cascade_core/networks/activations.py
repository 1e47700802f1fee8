"""Memory of a forward pass beside the weights, so that a host can make room for it.

Each function returns the largest number of values that are alive at once; times the bytes of one value, that is the
memory. The layer with the peak follows from the network, and the size of the peak was measured
(tests/core/test_activations.py): estimates are never below it, and at most half above it.
"""

from collections.abc import Sequence
from typing import Any

from .config import (
    PUBLISHED_LARGE,
    CompressorConfig,
    ControlNetConfig,
    PreviewerConfig,
    StageAConfig,
    StageBConfig,
    StageCConfig,
    UNetConfig,
)
from .stage_a import HIDDEN_VALUES

# In units of the level's width, per position: a residual block holds its input, the skip, and three times the
# fourfold hidden width.
RES_BLOCK = 15
TOKEN = 8  # in units of the tokens' width: mapped, joined, normed, and as keys and values


def stage_c(config: StageCConfig, batch: int, height: int, width: int, tokens: int) -> int:
    """Values alive in Stage C on a latent (B, 16, height, width) with `tokens` conditioning tokens."""
    return _unet(config, batch, height, width, config.switch_level) + TOKEN * config.c_cond * batch * tokens


def stage_b(config: StageBConfig, batch: int, height: int, width: int) -> int:
    """Values alive in Stage B on a latent (B, 4, height, width)."""
    return _unet(config, batch, height, width, [True] * (len(config.c_hidden) - 1))


def _unet(config: UNetConfig, batch: int, height: int, width: int, halved: Sequence[bool]) -> int:
    """Values alive in the widest level; `halved`: whether each boundary between levels halves both sides."""
    side, widest = config.patch_size, 0
    for c_hidden, halves in zip(config.c_hidden, [*halved, False], strict=True):
        widest = max(widest, -(-height // side) * -(-width // side) * c_hidden)
        side *= 2 if halves else 1
    return RES_BLOCK * widest * batch


def stage_a(config: StageAConfig, batch: int, height: int, width: int) -> int:
    """Values alive in Stage A, encoding or decoding a latent (B, C, height, width)."""
    values = config.c_hidden * batch * height * width
    return min(24 * values, max(11 * values, 8 * values + 2 * HIDDEN_VALUES))


def clip_encoder(config: Any, rows: int, tokens: int) -> int:
    """Values alive in CLIP's text or image encoder of transformers: the larger of its MLP and its attention."""
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    return rows * tokens * (max(7 * width, 2 * width + 3 * inner) + 2 * heads * tokens)


def compressor(config: CompressorConfig, batch: int, height: int, width: int) -> int:
    """Values alive in the semantic compressor on pictures (B, 3, height, width), whose first layers are the widest."""
    return 2 * config.stem * batch * height * width


def previewer(config: PreviewerConfig, batch: int, height: int, width: int) -> int:
    """Values alive in the previewer on Stage C's latent (B, C, height, width)."""
    return 34 * config.c_hidden * batch * height * width


def controlnet(config: ControlNetConfig, batch: int, height: int, width: int) -> int:
    """Values alive in a ControlNet on a hint (B, C, height, width)."""
    if config.hint_scale > 1:
        return 3 * config.stem * batch * height * width // 2
    narrow = config.c_hidden if config.bottleneck_mode == "large" else config.c_in
    wide = config.c_wide or (
        PUBLISHED_LARGE["c_wide"] if config.bottleneck_mode == "large" else 4 * config.c_in
    )
    return 5 * (wide + narrow) * batch * height * width // 4
