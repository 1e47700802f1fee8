"""ControlNets in both hosts: whether one fits a Stage C, its hint at the latent's size, when it is on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...cascade_core.errors import CascadeError
from ...cascade_core.networks.config import ControlNetConfig

Residuals = list[Tensor | None]  # (B, C, h, w) by the number of Stage C's residual block, None in the gaps

# What makes the hint of a published ControlNet, by its channels.
HINT_NODES = {
    1: "Cascade Canny",
    4: "Cascade Inpaint Hint",
    16: "Cascade Super Resolution Hint",
    512: "Cascade Identity Hint",
}
ROUNDING = 1e-4  # by which two ways to compute the same level of noise may differ, relatively


@dataclass(frozen=True)
class Control:
    """What a CONTROL_NET holds.

    name     of its file, or in words
    cascade  whether it is for Stage C
    config   of a network of ours, None for ComfyUI's own
    """

    name: str
    cascade: bool
    config: ControlNetConfig | None


def residual_blocks(network: Any) -> list[int]:
    """The width of every residual block of Stage C, ours or ComfyUI's, in the order in which they run."""
    widths = []
    for levels, mappers in (
        (network.down_blocks, network.down_repeat_mappers),
        (network.up_blocks, network.up_repeat_mappers),
    ):
        for level, repeats in zip(levels, mappers, strict=True):
            blocks = [block for block in level if hasattr(block, "depthwise")]
            widths += [block.depthwise.out_channels for block in blocks] * (len(repeats) + 1)
    return widths


def check_blocks(config: ControlNetConfig, name: str, widths: list[int]) -> None:
    """A ControlNet drives only blocks that Stage C has, at their width. widths: of `residual_blocks`."""
    for block in config.proj_blocks:
        if block < len(widths) and widths[block] == config.c_proj:
            continue
        there = f"{widths[block]} channels there" if block < len(widths) else f"{len(widths)} blocks"
        raise CascadeError(
            f"{name} drives residual block {block} with {config.c_proj} channels, but this Stage C has {there}; "
            "choose the ControlNet that was trained for it."
        )


def check_hint(config: ControlNetConfig, name: str, channels: int) -> None:
    """The hint has the channels that the ControlNet takes; grey is made of any."""
    if config.c_in in (1, channels):
        return
    node = HINT_NODES.get(config.c_in)
    advice = f"connect {node}" if node else "connect the hint that this ControlNet was trained on"
    raise CascadeError(
        f"{name} takes a hint of {config.c_in} channels, but the image has {channels}; {advice}."
    )


def fit_hint(hint: Tensor, config: ControlNetConfig, size: tuple[int, int]) -> Tensor:
    """The hint (B, C, H, W) for a latent of h × w positions, as (B, c_in, h, w) or 32 times that, float32.

    A hint of the picture's own proportions is stretched to the latent's, which are rounded up to whole positions;
    of any other the middle is taken, as ComfyUI does.
    """
    if config.c_in == 1 and hint.shape[1] > 1:
        hint = hint.mean(dim=1, keepdim=True)
    if not _same_proportions(hint, size):
        hint = _middle(hint, size)
    height, width = (side * config.hint_scale for side in size)
    mode = "bilinear" if config.hint_scale > 1 else "nearest-exact"
    return F.interpolate(hint.float(), size=(height, width), mode=mode)


def _same_proportions(hint: Tensor, size: tuple[int, int]) -> bool:
    """Whether one position more or less on one side would account for the difference."""
    height, width = size
    aspect = hint.shape[-1] / hint.shape[-2]
    return abs(width - height * aspect) < 1 or abs(height - width / aspect) < 1


def _middle(hint: Tensor, size: tuple[int, int]) -> Tensor:
    """The largest part around the middle that has the proportions of `size`."""
    height, width = hint.shape[-2:]
    aspect = size[1] / size[0]
    left = max(round((width - height * aspect) / 2), 0)
    top = max(round((height - width / aspect) / 2), 0)
    return hint[..., top : height - top, left : width - left]


def add_residuals(merged: Residuals, residuals: Residuals, strength: float) -> None:
    """Adds a ControlNet's residuals, times its strength, to those of others, block by block.

    The list grows as needed; its tensors are replaced, never written to.
    """
    merged += [None] * (len(residuals) - len(merged))
    for block, residual in enumerate(residuals):
        if residual is not None:
            mine, there = strength * residual, merged[block]
            merged[block] = mine if there is None else there + mine


def for_batch(residual: Tensor, batch: int, repeats: int = 1) -> Tensor:
    """Residuals of the hint's images for a batch of that many, which holds all images `repeats` times.

    Fewer hints than images go round.
    """
    if len(residual) == 1:
        return residual
    images = batch // repeats
    rounds = -(-images // len(residual))
    return residual.repeat(rounds, 1, 1, 1)[:images].repeat(repeats, 1, 1, 1)


def is_on(sigma: float | Tensor, first: float | Tensor, last: float | Tensor) -> bool:
    """Whether a level of noise lies within a range of them, from `first` down to `last`, both included."""
    return bool(last * (1 - ROUNDING) <= sigma <= first * (1 + ROUNDING))


def range_of(start: float, end: float, sigma: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """The levels of noise between two shares of the schedule; sigma: (t) -> level at time t from 1 to 0.

    As in ComfyUI, a range that ends at 0 or starts at 1 is empty.
    """
    first, last = (
        float("inf") if share <= 0 else 0.0 if share >= 1 else float(sigma(torch.tensor(1.0 - share)))
        for share in (start, end)
    )
    return first, last
