"""ControlNets in a sampling run: checks against Stage C and the hint, residuals, and the range in which one is on."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import CascadeError
from ..networks.config import ControlNetConfig
from .kinds import kind_of

Residuals = list[Tensor | None]  # (B, C, h, w) by the number of Stage C's residual block, None in the gaps

ROUNDING = 1e-4  # relative difference allowed between two ways to compute the same noise level


def residual_blocks(network: Any) -> list[int]:
    """Channels of every residual block of Stage C, ours or ComfyUI's, in the order in which they run."""
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
    """Raises CascadeError unless Stage C has the blocks that a ControlNet drives, at its width.

    name: of the ControlNet; widths: from `residual_blocks`.
    """
    for block in config.proj_blocks:
        if block < len(widths) and widths[block] == config.c_proj:
            continue
        expected = f"{widths[block]} channels there" if block < len(widths) else f"{len(widths)} blocks"
        raise CascadeError(
            f"{name} drives residual block {block} with {config.c_proj} channels, but this Stage C has {expected}; "
            "choose the ControlNet that was trained for it."
        )


def check_hint(config: ControlNetConfig, name: str, channels: int) -> None:
    """Raises CascadeError unless the hint has the ControlNet's channels; one channel takes any hint, as grey."""
    if config.c_in in (1, channels):
        return
    kind = kind_of(config.c_in)
    advice = f"connect {kind.node}" if kind else "connect the hint that this ControlNet was trained on"
    raise CascadeError(
        f"{name} takes a hint of {config.c_in} channels, but the image has {channels}; {advice}."
    )


def fit_hint(hint: Tensor, config: ControlNetConfig, size: tuple[int, int]) -> Tensor:
    """The hint (B, C, H, W) resized for a latent of h × w positions: (B, c_in, h, w), or 32 times that; float32.

    A hint with the picture's proportions is stretched to the latent's, whose sides are rounded up to whole
    positions; any other is cropped to its middle, as ComfyUI does.
    """
    if config.c_in == 1 and hint.shape[1] > 1:
        hint = hint.mean(dim=1, keepdim=True)
    if not _has_proportions(hint, size):
        hint = _centre_crop(hint, size)
    height, width = (side * config.hint_scale for side in size)
    mode = "bilinear" if config.hint_scale > 1 else "nearest-exact"
    return F.interpolate(hint.float(), size=(height, width), mode=mode)


def _has_proportions(hint: Tensor, size: tuple[int, int]) -> bool:
    """Whether rounding one side by at most one position accounts for the difference in aspect ratio."""
    height, width = size
    aspect = hint.shape[-1] / hint.shape[-2]
    return abs(width - height * aspect) < 1 or abs(height - width / aspect) < 1


def _centre_crop(hint: Tensor, size: tuple[int, int]) -> Tensor:
    """The largest part in the middle that has the proportions of `size`."""
    height, width = hint.shape[-2:]
    aspect = size[1] / size[0]
    left = min(max(round((width - height * aspect) / 2), 0), (width - 1) // 2)  # at least a pixel stays
    top = min(max(round((height - width / aspect) / 2), 0), (height - 1) // 2)
    return hint[..., top : height - top, left : width - left]


def add_residuals(merged: Residuals, residuals: Residuals, strength: float) -> None:
    """Adds a ControlNet's residuals, times its strength, to `merged`, block by block.

    The list grows as needed; its tensors are replaced, never written to.
    """
    merged += [None] * (len(residuals) - len(merged))
    for block, residual in enumerate(residuals):
        if residual is not None:
            weighted, total = strength * residual, merged[block]
            merged[block] = weighted if total is None else total + weighted


def for_batch(residual: Tensor, batch: int, repeats: int = 1) -> Tensor:
    """Repeats the residuals (N, C, h, w) of N hints for a batch that holds all its images `repeats` times.

    Where there are fewer hints than images, they are used in turn.
    """
    if len(residual) == 1:
        return residual
    images = batch // repeats
    rounds = -(-images // len(residual))
    return residual.repeat(rounds, 1, 1, 1)[:images].repeat(repeats, 1, 1, 1)


def is_on(sigma: float | Tensor, first: float | Tensor, last: float | Tensor) -> bool:
    """Whether the noise level `sigma` lies within a range, from `first` down to `last`, both included."""
    return bool(last * (1 - ROUNDING) <= sigma <= first * (1 + ROUNDING))


def range_of(start: float, end: float, sigma: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """(first, last), the noise levels at two shares of the schedule; sigma: (t) -> level at time t from 1 to 0.

    As in ComfyUI, a range that ends at 0 or starts at 1 is empty.
    """
    first, last = (
        float("inf") if share <= 0 else 0.0 if share >= 1 else float(sigma(torch.tensor(1.0 - share)))
        for share in (start, end)
    )
    return first, last
