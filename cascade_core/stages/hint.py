"""The hint that a ControlNet reads, made of a picture by the ControlNet's kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CascadeError
from ..geometry import stage_c_size
from ..hints.canny import canny_hint
from ..hints.filters import READS, inpaint_hint, super_resolution_hint, super_resolution_input
from ..hints.kinds import kind_of
from ..pictures import Picture, as_image, as_mask
from .codec import Codec
from .control import ControlNetStage


@dataclass(frozen=True)
class Control:
    """A ControlNet with the picture that it steers by.

    file        a path, or a name in the folder's `controlnet`
    image       the picture whose edges, surroundings or content are followed; None: the call's own `image`
    strength    how strongly it pulls; 0: not at all
    start, end  the shares of the steps that it is on for
    mask        of an inpainting ControlNet; None: the call's own
    hint        the hint itself, (B, H, W, C), for kinds that make none of a picture (identity) or for one that is made
                already
    low, high   canny: contrasts below and above which an edge is none, or always one
    reads       super resolution: whether it was trained to read the "small" picture or the same "enlarged"
    """

    file: str | Path
    image: Picture | None = None
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mask: Picture | None = None
    hint: Tensor | None = None
    low: int = 100
    high: int = 200
    reads: str = "small"


def make_hint(
    control: Control,
    stage: ControlNetStage,
    size: tuple[int, int],
    source: Tensor | None,
    source_mask: Tensor | None,
    compressor: Callable[[], Codec],
) -> Tensor:
    """The hint (B, C, H, W) of a control for a picture of size (width, height).

    source, source_mask: the call's own picture (B, H, W, 3) and mask (B, H, W); compressor: loads it on demand.
    Raises CascadeError where a picture or a mask is missing.
    """
    if not 0 <= control.start <= control.end <= 1:
        raise CascadeError(
            f"start is {control.start} and end {control.end}, but must be 0 <= start <= end <= 1."
        )
    if control.hint is not None:
        return _given_hint(control.hint)
    image = source if control.image is None else as_image(control.image)
    if image is None:
        raise CascadeError(f"{stage.file} was given no picture; give Control(…, image=…).")
    channels = stage.network.config.c_in
    kind = kind_of(channels)
    name = None if kind is None else kind.name
    pictures = image.movedim(-1, 1)  # (B, 3, H, W)
    if name == "canny":
        edges = canny_hint(pictures, control.low, control.high)
        return edges.repeat(1, 3, 1, 1)
    if name == "inpainting":
        mask = source_mask if control.mask is None else as_mask(control.mask)
        if mask is None:
            raise CascadeError(f"{stage.file} paints into a hole, but no mask was given; give mask.")
        return inpaint_hint(pictures, mask)
    if name == "super_resolution":
        return _super_resolution(control, image, size, compressor())
    raise CascadeError(
        f"{stage.file} takes a hint of {channels} channels, which no picture gives; give Control(…, hint=…)."
    )


def _given_hint(hint: Tensor) -> Tensor:
    if not isinstance(hint, Tensor) or hint.ndim not in (3, 4) or 0 in hint.shape:
        shape = f"of shape {tuple(hint.shape)}" if isinstance(hint, Tensor) else type(hint).__name__
        raise CascadeError(f"hint is {shape}; give a tensor (height, width, C) or (batch, height, width, C).")
    if not hint.is_floating_point() or not torch.isfinite(hint).all():
        raise CascadeError(f"hint is of {hint.dtype}, or holds NaN; give finite floating-point values.")
    return (hint[None] if hint.ndim == 3 else hint).movedim(-1, 1)


def _super_resolution(control: Control, image: Tensor, size: tuple[int, int], compressor: Codec) -> Tensor:
    if control.reads not in READS:
        raise CascadeError(f"reads is {control.reads!r}; choose {' or '.join(READS)}.")
    width, height = size
    positions = stage_c_size(height, width)
    scale = width / image.shape[2] if control.reads == "small" else 1
    small = super_resolution_input(image, positions, scale)
    return super_resolution_hint(
        lambda pictures: compressor.encode(pictures.movedim(1, -1)), small, positions
    )
