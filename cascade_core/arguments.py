"""What the front door is given: settings, and the checks of every argument before a network is loaded for it."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal

from torch import Tensor

from .diffusion.guidance import check_guidance
from .diffusion.samplers import log_snr_range
from .errors import CascadeError
from .geometry import MAX_SIZE, check_size
from .hints.masks import expand
from .run import check_sampler
from .stages.diffusion import stage_b_tile
from .stages.hint import Control
from .stages.prompt import Prompt

Output = Literal["pil", "tensor"]
Size = tuple[int, int]  # (width, height) in pixels


@dataclass(frozen=True)
class StageSettings:
    """How one stage is sampled: its node's inputs of the same names."""

    steps: int
    cfg: float
    cfg_rescale: float = 0.7
    shift: float = 1.0
    sampler: str = "ddpm"


PRIOR = StageSettings(steps=20, cfg=4.0, shift=2.0)  # published, for Stage C
DECODER = StageSettings(steps=10, cfg=1.1)  # and for Stage B
SECOND_PASS = StageSettings(steps=5, cfg=1.0, cfg_rescale=0.0)


def chosen_settings(
    settings: StageSettings,
    steps: int | None,
    cfg: float | None,
    cfg_rescale: float | None,
    shift: float | None,
    sampler: str | None,
) -> StageSettings:
    """A stage's settings with those of a call in their place.  Raises CascadeError for what is not settings."""
    _check_is_settings(settings)
    stated = {"steps": steps, "cfg": cfg, "cfg_rescale": cfg_rescale, "shift": shift, "sampler": sampler}
    return replace(settings, **{name: value for name, value in stated.items() if value is not None})


def check_settings(settings: StageSettings, denoise: float, owner: str) -> None:
    """Raises CascadeError for settings that no stage can be sampled with.  owner: of them, for messages"""
    _check_is_settings(settings)
    for name in ("cfg", "cfg_rescale", "shift"):
        _check_number(f"{owner}{name}", getattr(settings, name))
    _check_number(f"{owner}denoise", denoise)
    check_sampler(settings.sampler)
    check_guidance(settings.cfg, settings.cfg_rescale)
    log_snr_range(whole_number(f"{owner}steps", settings.steps), settings.shift)
    if not 0 <= denoise <= 1:
        raise CascadeError(f"{owner}denoise is {denoise}; it must lie within 0 and 1.")


def check_decoding(settings: StageSettings, denoise: float, tile_size: int, output: Output) -> None:
    """Refuses what Stage B and Stage A would refuse, before Stage C is sampled."""
    check_settings(settings, denoise, "decoder's ")
    stage_b_tile(whole_number("tile_size", tile_size))
    if output not in ("pil", "tensor"):
        raise CascadeError(f"output is {output!r}; choose 'pil' or 'tensor'.")


def _check_is_settings(settings: object) -> None:
    if not isinstance(settings, StageSettings):
        raise CascadeError(f"Settings of type {type(settings).__name__} were given; give StageSettings(…).")


def check_mask(mask: Tensor | None, source: Tensor | None, grow: int = 0, feather: int | None = None) -> None:
    """Raises CascadeError for a mask without the picture that it belongs to, and for edges below 0."""
    if mask is not None and source is None:
        raise CascadeError("mask was given without image; give the picture that it belongs to.")
    for name, width in (("grow", grow), ("feather", 0 if feather is None else feather)):
        if whole_number(name, width) < 0:
            raise CascadeError(f"{name} is {width}; it cannot be below 0.")


def check_controls(controls: object) -> None:
    """Raises CascadeError for what is not a list of ControlNets with numbers."""
    if not isinstance(controls, list | tuple) or not all(isinstance(one, Control) for one in controls):
        raise CascadeError("controls is not a list of Control; give [Control(file, image=…), …].")
    for control in controls:
        check_strength("A control's strength", control.strength)
        for name in ("start", "end", "low", "high"):
            _check_number(f"A control's {name}", getattr(control, name))


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, Real):
        raise CascadeError(f"{name} is {value!r}; give a number.")


def check_strength(name: str, value: Any) -> None:
    """Raises CascadeError for what is not a finite number."""
    _check_number(name, value)
    if isinstance(value, bool) or not math.isfinite(value):
        raise CascadeError(f"{name} is {value!r}; give a finite number, such as 1.0.")


def whole_number(name: str, value: Any) -> int:
    """A whole number of any library as Python's own."""
    try:
        return operator.index(value)
    except TypeError:
        raise CascadeError(f"{name} is {value!r}; give a whole number.") from None


def checked_size(size: Any) -> Size:
    """A size as two whole numbers.  Raises CascadeError for one that no picture can have."""
    try:
        width, height = map(operator.index, size)
    except (TypeError, ValueError):
        raise CascadeError(f"size is {size!r}; give (width, height) in whole pixels.") from None
    check_size(width, height)
    return width, height


def batch_size(batch: int | None, prompt: Prompt, source: Tensor | None) -> int:
    """How many pictures are made of so many prompts and images.  Raises CascadeError where these disagree."""
    counts = {len(prompt.states), len(source) if source is not None else 1} - {1}
    most = max(counts, default=1)
    batch = most if batch is None else whole_number("batch", batch)
    if batch < 1 or len(counts) > 1 or most not in (1, batch):
        raise CascadeError(
            f"batch is {batch}, with {len(prompt.states)} prompts and "
            f"{len(source) if source is not None else 0} images; give one of each, or as many as the batch."
        )
    return batch


def expanded(
    source: Tensor | None, mask: Tensor | None, room: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor]:
    """A picture (B, H, W, 3) with room around it, and the mask of what is to be painted.  Raises CascadeError."""
    if source is None or mask is not None:
        raise CascadeError("room is for an image without a mask: it makes the mask; give one or the other.")
    try:
        left, top, right, bottom = map(operator.index, room)
    except (TypeError, ValueError):
        raise CascadeError(f"room is {room!r}; give (left, top, right, bottom) in whole pixels.") from None
    if max(source.shape[2] + left + right, source.shape[1] + top + bottom) > MAX_SIZE:
        raise CascadeError(f"room is {room}, which makes a side above {MAX_SIZE} pixels; give less.")
    larger, hole = expand(source.movedim(-1, 1), left, top, right, bottom, feather=32)
    return larger.movedim(1, -1), hole
