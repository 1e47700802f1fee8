# pyright: reportMissingImports=false
"""Areas of prompts, in positions of a stage's latent.

ComfyUI counts areas as if every latent had 8 pixels per position. Stage C's latent has 42.67, or what its node's
`compression` says, and Stage B's has 4.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import comfy.model_base
import comfy.samplers
from comfy.patcher_extension import WrappersMP

from ....cascade_core.geometry import STAGE_B_COMPRESSION, STAGE_C_COMPRESSION
from .conditions import LastingPrior

UNIT = 8  # pixels of ComfyUI's numbers
KEY = "cascade_areas"
# Key in the host's transformer_options: pixels per position of Stage C's latent, if the run knows them.
COMPRESSION = "cascade_compression"


class Positions(tuple):
    """(height, width, top, left) of an area, converted to positions of the latent."""


def count_in_pixels(patcher: Any) -> None:
    """Makes the host's samplers read areas in pixels for this MODEL."""
    patcher.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, _prepare)


def with_pixel_areas(patcher: Any, compression: float) -> Any:
    """The MODEL, ours or the host's own, for a run whose Stage C latent has `compression` pixels per position."""
    patched = patcher.clone()
    count_in_pixels(patched)
    patched.model_options["transformer_options"][COMPRESSION] = compression
    return patched


def part_the_prior(patcher: Any) -> None:
    """Makes the host's own Stage B give an area only its part of Stage C's latent, as ours does."""
    patcher.add_object_patch("extra_conds", partial(_native_conditions, patcher.model))


def _native_conditions(model: Any, **prompt: Any) -> dict[str, Any]:
    conditions = type(model).extra_conds(model, **prompt)
    patch_size = model.diffusion_model.embedding[0].downscale_factor
    conditions["effnet"] = LastingPrior.of_latent(conditions["effnet"].cond, prompt["noise"], patch_size)
    return conditions


def wraps_the_network(options: dict[str, Any]) -> bool:
    """Whether there are wrappers called within a step, which may change the network's arguments."""
    return bool(set(options.get("wrappers") or {}) - {WrappersMP.PREPARE_SAMPLING, WrappersMP.OUTER_SAMPLE})


def _prepare(
    execute: Callable[..., Any], model: Any, noise_shape: Sequence[int], conds: dict, *rest, **options
):
    sides = tuple(noise_shape[2:])
    if len(sides) == 2:
        run_options = (options.get("model_options") or {}).get("transformer_options", {})
        grid = Grid(model.model, sides, run_options.get(COMPRESSION, STAGE_C_COMPRESSION))
        conds = {
            name: [grid.placed(cond, model.load_device) for cond in side] for name, side in conds.items()
        }
    return execute(model, noise_shape, conds, *rest, **options)


class Grid:
    """The positions of a stage's latent.  sides: (height, width); compression: pixels per position of Stage C's"""

    def __init__(self, base: Any, sides: tuple[int, ...], compression: float):
        self.sides = sides
        self.pixels, self.patch, self.min_side = compression, 1, 1
        if isinstance(base, comfy.model_base.StableCascade_B):
            network = base.diffusion_model
            self.pixels, self.patch = STAGE_B_COMPRESSION, network.embedding[0].downscale_factor
            # A smaller side would vanish at the network's innermost level.
            self.min_side = self.patch * 2 ** (len(network.down_blocks) - 1)

    def placed(self, cond: dict[str, Any], device: Any) -> dict[str, Any]:
        """Returns the prompt with its area, or its mask's area, in positions."""
        area = cond.get("area")
        if isinstance(area, Positions) or not (area or cond.get("set_area_to_bounds")):
            return cond
        if area and area[0] != "percentage":
            if len(area) != 4:
                return cond
            cond = {**cond, "area": self._of_pixels(area)}
        resolved = [cond]  # the host resolves shares of the sides, and bounds of masks
        comfy.samplers.resolve_areas_and_cond_masks_multidim(resolved, self.sides, device)
        return {**resolved[0], "area": self._within(resolved[0]["area"]), "set_area_to_bounds": False}

    def _of_pixels(self, area: Sequence[int]) -> tuple[int, ...]:
        """Edges at the nearest positions, so that areas side by side neither overlap nor leave a gap."""
        starts, stops = [], []
        for size, start, side in zip(area[:2], area[2:], self.sides, strict=True):
            stop = (start + size) * UNIT / self.pixels
            starts.append(round(start * UNIT / self.pixels))
            # The last position may end outside the picture.
            stops.append(side if stop > side - 1 else round(stop))
        return (*(stop - start for start, stop in zip(starts, stops, strict=True)), *starts)

    def _within(self, area: Sequence[int]) -> Positions:
        """The area moved to whole patches, within the latent, and enlarged to the network's smallest side."""
        sizes, starts = [], []
        for size, start, side in zip(area[:2], area[2:], self.sides, strict=True):
            stop = min(-(-(start + max(size, 1)) // self.patch) * self.patch, side)
            start = min(start, side - 1) // self.patch * self.patch
            stop = min(max(stop, start + self.min_side), side)
            start = max(min(start, (stop - self.min_side) // self.patch * self.patch), 0)
            sizes.append(stop - start)
            starts.append(start)
        return Positions((*sizes, *starts))
