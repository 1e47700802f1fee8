# pyright: reportMissingImports=false
"""Conditions and schedule of our models, made so that a sampling step never waits for the device."""

from functools import cache
from typing import Any

import comfy.conds
import comfy.model_management
import comfy.model_sampling
import torch
from torch import Tensor

from ....cascade_core.networks.layers import resize


class LastingCond(comfy.conds.CONDRegular):
    """A condition whose batch is the same tensor at every step, so that the engine recognises it without comparing
    values.

    The host's own conditions make a new batch for each step.
    """

    def __init__(self, cond: Tensor):
        super().__init__(cond)
        self._batches: dict[int, Any] = {}
        self._joined: tuple[list[Any], Tensor] | None = None  # (other conditions, the batch joined with them)

    def process_cond(self, batch_size: int, **options: Any) -> Any:
        if batch_size not in self._batches:
            self._batches[batch_size] = super().process_cond(batch_size, **options)
        return self._batches[batch_size]

    def concat(self, others: list[Any]) -> Tensor:
        if self._joined is None or not _same(self._joined[0], others):
            self._joined = list(others), super().concat(others)
        return self._joined[1]


class LastingPrior(LastingCond):
    """Stage C's latent; an area's prompt gets the part inside the area, as a tile does.

    grid: (height, width) of Stage B's latent in patches
    """

    def __init__(self, cond: Tensor, grid: tuple[int, int], patch_size: int):
        super().__init__(cond)
        self.grid, self.patch_size = grid, patch_size
        self._parts: dict[tuple[int, ...], LastingCond] = {}

    @classmethod
    def of_latent(cls, cond: Tensor, latent: Tensor, patch_size: int) -> "LastingPrior":
        """Builds the condition for a Stage B latent of shape (…, H, W)."""
        height, width = (-(-side // patch_size) for side in latent.shape[-2:])
        return cls(cond, (height, width), patch_size)

    def _copy_with(self, cond: Tensor) -> LastingCond:
        return LastingCond(cond)

    def process_cond(self, batch_size: int, area: Any = None, **options: Any) -> Any:
        if area is None:
            return super().process_cond(batch_size, **options)
        height, width, top, left = area
        if (height, width, top, left) not in self._parts:
            rows, columns = (
                slice(start // self.patch_size, -(-(start + size) // self.patch_size))
                for size, start in ((height, top), (width, left))
            )
            part = resize(self.cond, self.grid)[..., rows, columns]
            self._parts[height, width, top, left] = LastingCond(part)
        return self._parts[height, width, top, left].process_cond(batch_size, **options)


def _same(values: list[Any], others: list[Any]) -> bool:
    return len(values) == len(others) and all(a is b for a, b in zip(values, others, strict=True))


def lasting(model: Any, values: dict[str, Tensor], device: torch.device) -> dict[str, LastingCond]:
    """Conditions of a run, on the device and in the precision that the model computes in."""
    dtype = model.manual_cast_dtype or model.get_dtype()
    cast = comfy.model_management.cast_to_device
    return {name: LastingCond(cast(value, device, dtype)) for name, value in values.items()}


TABLES = ("sigmas", "log_sigmas")


class LazySchedule(comfy.model_sampling.StableCascadeSampling, comfy.model_sampling.EPS):
    """The host's schedule. Its table of sigmas, which takes half a second, is only made when a scheduler reads it."""

    def set_parameters(self, shift: float = 1.0, cosine_s: float = 8e-3) -> None:
        for name in TABLES:
            self._buffers.pop(name, None)
        self.shift, self.num_timesteps = shift, 10000
        self.cosine_s = torch.tensor(cosine_s)
        self._init_alpha_cumprod = torch.cos(self.cosine_s / (1 + self.cosine_s) * torch.pi * 0.5) ** 2

    def __getattr__(self, name: str) -> Any:
        if name in TABLES and name not in self._buffers:
            self._buffers.update(dict.fromkeys(TABLES))  # registering a buffer checks whether the name exists
            super().set_parameters(self.shift, self.cosine_s.item())
        return super().__getattr__(name)


def new_schedule(model_config: Any) -> Any:
    """A model's own schedule."""
    kept: Any = _kept(LazySchedule)  # type: ignore[arg-type] (a class is hashable)
    return kept(model_config)


def keep_on_device(schedule: Any) -> None:
    """Makes a Stable Cascade schedule of the host keep its constants on each device where it computes times.

    Otherwise it copies them there twice a step, and each copy waits for all work queued on the device.
    """
    schedule.__class__ = _kept(type(schedule))


@cache
def _kept(schedule: type) -> type:
    if hasattr(schedule, "constants"):
        return schedule

    def timestep(self: Any, sigma: Tensor) -> Tensor:
        own = self.cosine_s, self._init_alpha_cumprod
        if sigma.device not in self.constants:
            self.constants = {**self.constants, sigma.device: tuple(value.to(sigma.device) for value in own)}
        self.cosine_s, self._init_alpha_cumprod = self.constants[sigma.device]
        try:
            return schedule.timestep(self, sigma)
        finally:
            self.cosine_s, self._init_alpha_cumprod = own

    return type(schedule.__name__, (schedule,), {"timestep": timestep, "constants": {}})
