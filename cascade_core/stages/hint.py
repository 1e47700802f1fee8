"""Makes a ControlNet's hint from a picture, by the ControlNet's kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import limits
from ..errors import CascadeError, quoted
from ..geometry import stage_c_size
from ..hints.canny import canny_hint
from ..hints.filters import READS, inpaint_hint, super_resolution_hint, super_resolution_input
from ..hints.kinds import kind_of
from ..limits import real_number, whole_number
from ..pictures import Picture, as_image, as_mask, finite_values
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
    hint        the hint itself, (B, H, W, C), for kinds whose hint is not made from a picture (identity), or if you
                have made it
    low, high   canny: contrasts; nothing below `low` is an edge, and everything above `high` is
    reads       super resolution: "small" or "enlarged", the form of the small picture that it was trained to read
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


def checked_control(control: object, name: str) -> Control:
    """A control with its pictures and its hint as tensors.  Raises CascadeError for values that no ControlNet can use.

    name: of the argument, for messages
    """
    if not isinstance(control, Control):
        raise CascadeError(f"{name} is of type {type(control).__name__}; give Control(file, image=…).")
    start, end = (
        real_number(f"{name}.{edge}", getattr(control, edge), limits.SHARE) for edge in ("start", "end")
    )
    if start > end:
        raise CascadeError(
            f"{name} has start {start:g} and end {end:g}; give a start that is not after the end."
        )
    low, high = (
        whole_number(f"{name}.{edge}", getattr(control, edge), limits.CANNY) for edge in ("low", "high")
    )
    if low > high:
        raise CascadeError(f"{name} has low {low} and high {high}; give the smaller one as low.")
    if not isinstance(control.reads, str) or control.reads not in READS:
        raise CascadeError(f"{name}.reads is {quoted(control.reads)}; choose {' or '.join(READS)}.")
    return Control(
        control.file,
        None if control.image is None else as_image(control.image, f"{name}.image"),
        real_number(f"{name}.strength", control.strength, limits.CONTROL_STRENGTH),
        start,
        end,
        None if control.mask is None else as_mask(control.mask, f"{name}.mask"),
        None if control.hint is None else _checked_hint(control.hint, f"{name}.hint"),
        low,
        high,
        control.reads,
    )


def make_hint(
    control: Control,
    stage: ControlNetStage,
    size: tuple[int, int],
    source: Tensor | None,
    source_mask: Tensor | None,
    compressor: Callable[[], Codec],
) -> Tensor:
    """The hint (B, C, H, W) of a checked control for a picture of size (width, height).

    source, source_mask: the call's own picture (B, H, W, 3) and mask (B, H, W); compressor: loads it on demand.
    Raises CascadeError where a picture or a mask is missing.
    """
    if control.hint is not None:
        return control.hint.movedim(-1, 1)
    image = source if control.image is None else control.image
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
        mask = source_mask if control.mask is None else control.mask
        if mask is None:
            raise CascadeError(f"{stage.file} paints into a hole, but no mask was given; give mask.")
        return inpaint_hint(pictures, mask)
    if name == "super_resolution":
        return _super_resolution(control, image, size, compressor())
    raise CascadeError(
        f"{stage.file} takes a hint of {channels} channels, which no picture gives; give Control(…, hint=…)."
    )


def _checked_hint(hint: Any, name: str) -> Tensor:
    """(B, H, W, C)"""
    if not isinstance(hint, Tensor):
        raise CascadeError(
            f"{name} is of type {type(hint).__name__}; give a tensor (batch, height, width, C)."
        )
    values = finite_values(hint, name)
    if not hint.is_floating_point():
        raise CascadeError(f"{name} holds values of {hint.dtype}; give floats.")
    batch = values[None] if values.ndim == 3 else values
    if batch.ndim != 4 or 0 in batch.shape:
        raise CascadeError(
            f"{name} has the shape {quoted(tuple(hint.shape))}; give (height, width, C) or (batch, height, width, C)."
        )
    return batch


def _super_resolution(control: Control, image: Tensor, size: tuple[int, int], compressor: Codec) -> Tensor:
    width, height = size
    positions = stage_c_size(height, width)
    # A picture larger than the one to be made is read at that one's size, not at its own.
    scale = max(width / image.shape[2], 1) if control.reads == "small" else 1
    small = super_resolution_input(image, positions, scale)
    return super_resolution_hint(
        lambda pictures: compressor.encode(pictures.movedim(1, -1)), small, positions
    )
