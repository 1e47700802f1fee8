"""Arguments of the front door: settings, and the check of every argument before a network is loaded."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import numpy as np
from torch import Tensor

from . import limits
from .errors import CascadeError, quoted
from .geometry import MAX_SIZE, check_pixels, check_size, stage_c_size
from .hints.masks import expand
from .limits import real_number, whole_number
from .pictures import Picture, as_image, as_mask
from .run import check_sampler
from .stages.diffusion import stage_b_tile
from .stages.hint import Control, checked_control
from .stages.prompt import check_text

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


@dataclass(frozen=True)
class Sampling:
    """How one stage is sampled in a call. All numbers are Python's own types and in range."""

    settings: StageSettings
    seed: int
    denoise: float
    engine: bool
    callback: Callable[[Any], object] | None


def checked_sampling(
    settings: StageSettings,
    seed: int,
    engine: bool,
    callback: Callable[[Any], object] | None,
    denoise: float = 1.0,
    owner: str = "",
) -> Sampling:
    """Raises CascadeError for arguments that no stage can be sampled with.  owner: name of `settings` in messages"""
    if callback is not None and not callable(callback):
        raise CascadeError(
            f"callback is of type {type(callback).__name__}; give a function of a StageProgress."
        )
    return Sampling(
        checked_settings(settings, owner),
        whole_number("seed", seed, limits.SEED),
        real_number("denoise", denoise, limits.DENOISE),
        checked_flag("engine", engine),
        callback,
    )


def chosen_settings(
    settings: StageSettings,
    steps: int | None,
    cfg: float | None,
    cfg_rescale: float | None,
    shift: float | None,
    sampler: str | None,
) -> StageSettings:
    """A stage's settings, each replaced by the call's own where the call gives one."""
    stated = {"steps": steps, "cfg": cfg, "cfg_rescale": cfg_rescale, "shift": shift, "sampler": sampler}
    return replace(settings, **{name: value for name, value in stated.items() if value is not None})


def checked_settings(settings: StageSettings, owner: str = "") -> StageSettings:
    """Settings whose numbers are Python's own types.  Raises CascadeError for settings out of range.

    owner: name of the settings in messages; empty where each setting is an argument of its own
    """
    if not isinstance(settings, StageSettings):
        raise CascadeError(f"{owner} is of type {type(settings).__name__}; give StageSettings(…).")
    prefix = owner and f"{owner}."
    check_sampler(settings.sampler, f"{prefix}sampler")
    return StageSettings(
        whole_number(f"{prefix}steps", settings.steps, limits.STEPS),
        real_number(f"{prefix}cfg", settings.cfg, limits.CFG),
        real_number(f"{prefix}cfg_rescale", settings.cfg_rescale, limits.CFG_RESCALE),
        real_number(f"{prefix}shift", settings.shift, limits.SHIFT),
        settings.sampler,
    )


def checked_prompts(prompt: str | Sequence[str], negative: str) -> tuple[list[str], str]:
    """The prompts (one for all pictures, or one each) and the negative.  Raises CascadeError for what is not text."""
    check_text("negative", negative)
    if isinstance(prompt, str):
        check_text("prompt", prompt)
        return [prompt], negative
    try:
        # A set has no order.
        texts = None if isinstance(prompt, bytes | bytearray | Mapping | Set) else iter(prompt)
    except TypeError:
        texts = None
    if texts is None:
        raise CascadeError(f"prompt is of type {type(prompt).__name__}; give text, or a list of texts.")
    prompts = list(islice(texts, limits.BATCH.most + 1))
    if not 1 <= len(prompts) <= limits.BATCH.most:
        held = "more" if prompts else "no texts"
        raise CascadeError(f"prompt holds {held}, but {limits.BATCH} texts are expected; give so many.")
    for number, text in enumerate(prompts):
        check_text(f"prompt[{number}]", text)
    return prompts, negative


def checked_image(image: Picture | None) -> Tensor | None:
    """(B, H, W, 3), or None.  Raises CascadeError for what is not a picture."""
    return None if image is None else as_image(image, "image")


def checked_mask(mask: Picture | None, owner: Tensor | None) -> Tensor | None:
    """(B, H, W), or None.  Raises CascadeError for what is not a mask, and for one without the picture it belongs to.

    owner: the picture, or the latent
    """
    if mask is None:
        return None
    if owner is None:
        raise CascadeError("mask was given without image; give the picture that it belongs to.")
    return as_mask(mask, "mask")


def check_start(denoise: float, start: Tensor | None, names: str = "image") -> None:
    """Raises CascadeError for a denoise below 1 without a latent or picture to start from."""
    if denoise < 1 and start is None:
        raise CascadeError(
            f"denoise is {denoise:g}, which keeps a part of what it starts from, but nothing was given; give {names}."
        )


def checked_image_prompts(image_prompts: Sequence[Any]) -> list[tuple[Tensor, float]]:
    """Each picture (B, H, W, 3) with its strength.  Raises CascadeError for anything else."""
    if not isinstance(image_prompts, list | tuple):
        raise CascadeError(
            f"image_prompts is of type {type(image_prompts).__name__}; give a list of pictures, each alone or with its "
            "strength: (picture, strength)."
        )
    prompts = []
    for number, entry in enumerate(image_prompts):
        name = f"image_prompts[{number}]"
        if isinstance(entry, tuple) and len(entry) != 2:
            raise CascadeError(
                f"{name} holds {len(entry)} values; give a picture alone, or (picture, strength)."
            )
        picture, strength = entry if isinstance(entry, tuple) else (entry, 1.0)
        strength = real_number(f"The strength of {name}", strength, limits.STRENGTH)
        prompts.append((as_image(picture, name), strength))
    return prompts


def checked_controls(controls: Sequence[Control]) -> list[Control]:
    """ControlNets with their pictures as tensors.  Raises CascadeError for values that no ControlNet can use."""
    if not isinstance(controls, list | tuple):
        raise CascadeError(
            f"controls is of type {type(controls).__name__}; give a list: [Control(file, image=…), …]."
        )
    return [checked_control(control, f"controls[{number}]") for number, control in enumerate(controls)]


def checked_tile(tile_size: int) -> int:
    """Side of a tile in pixels, 0: no tiles.  Raises CascadeError for a side that no tile can have."""
    tile_size = whole_number("tile_size", tile_size, limits.TILE)
    stage_b_tile(tile_size)
    return tile_size


def check_output(output: str) -> None:
    """Raises CascadeError for an output that is neither "pil" nor "tensor"."""
    if not isinstance(output, str) or output not in ("pil", "tensor"):
        raise CascadeError(f"output is {quoted(output)}; choose 'pil' or 'tensor'.")


def checked_flag(name: str, value: bool) -> bool:
    """Raises CascadeError for anything but True and False, because Python takes any text for true, even "no"."""
    if not isinstance(value, bool | np.bool_):
        raise CascadeError(f"{name} is {quoted(value)}; give True or False.")
    return bool(value)


def checked_size(size: Size) -> Size:
    """A size as two whole numbers.  Raises CascadeError for one that no picture can have."""
    try:
        width, height = map(operator.index, size)
    except (TypeError, ValueError):
        raise CascadeError(f"size is {quoted(size)}; give (width, height) in whole pixels.") from None
    check_size(width, height)
    return width, height


def check_latent_size(latent: Tensor, size: Size) -> None:
    """Raises CascadeError for a latent (B, C, h, w) that belongs to another picture size."""
    width, height = size
    positions, expected = tuple(latent.shape[-2:]), stage_c_size(height, width)
    if positions != expected:
        raise CascadeError(
            f"size is {width} × {height}, of which Stage C's latent is {expected[1]} × {expected[0]}, but latent is "
            f"{positions[1]} × {positions[0]}; leave size out."
        )


def batch_size(batch: int | None, size: Size, **counts: Sequence[Any] | Tensor | None) -> int:
    """Number of pictures to make, from the numbers of prompts, images, masks and latents.

    Raises CascadeError where their counts disagree, and for more pixels than a call may make.
    """
    numbers = {name: len(given) for name, given in counts.items() if given is not None}
    most = max(numbers.values(), default=1)
    batch = most if batch is None else whole_number("batch", batch, limits.BATCH)
    if any(number not in (1, batch) for number in numbers.values()):
        listed = ", ".join(
            f"{number} {name[: -1 if number == 1 else None]}" for name, number in numbers.items()
        )
        raise CascadeError(f"batch is {batch}, with {listed}; give one of each, or as many as the batch.")
    check_pixels(*size, batch)
    return batch


def expanded(
    source: Tensor | None, mask: Picture | None, room: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor]:
    """A picture (B, H, W, 3) with room around it, and the mask of the area to paint.  Raises CascadeError."""
    if source is None or mask is not None:
        raise CascadeError("room is for an image without a mask: it makes the mask; give one or the other.")
    try:
        left, top, right, bottom = map(operator.index, room)
    except (TypeError, ValueError):
        raise CascadeError(
            f"room is {quoted(room)}; give (left, top, right, bottom) in whole pixels."
        ) from None
    if min(left, top, right, bottom) < 0:
        raise CascadeError(f"room is {quoted(room)}; give pixels of 0 or more.")
    height, width = source.shape[1] + top + bottom, source.shape[2] + left + right
    if max(height, width) > MAX_SIZE:
        raise CascadeError(f"room is {quoted(room)}, which makes a side above {MAX_SIZE} pixels; give less.")
    check_pixels(width, height, len(source))
    larger, hole = expand(source.movedim(-1, 1), left, top, right, bottom, feather=32)
    return larger.movedim(1, -1), hole
