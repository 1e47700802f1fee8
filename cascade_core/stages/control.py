"""ControlNets, loaded, and their part in a sampling run of Stage C."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import load_model
from ..diffusion.schedule import log_snr as schedule
from ..hints.control import (
    Residuals,
    add_residuals,
    check_blocks,
    check_hint,
    fit_hint,
    for_batch,
    is_on,
    range_of,
    residual_blocks,
)
from ..networks import activations
from ..run import RunObserver, SamplingRun
from .device import ComputeDevice


@dataclass(frozen=True)
class ControlNetStage:
    """A ControlNet in evaluation mode, in main memory or on the device."""

    network: Any  # ControlNet
    file: str
    device: ComputeDevice

    def networks(self) -> list[tuple[nn.Module, str]]:
        """The network with the name of its file."""
        return [(self.network, self.file)]


@dataclass(frozen=True, eq=False)
class AppliedControlNet:
    """A ControlNet with its hint (B, C, H, W), strength, and range as shares of the schedule."""

    stage: ControlNetStage
    hint: Tensor
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def levels(self, shift: float) -> tuple[float, float]:
        """The levels of noise that it is on for, from the first to the last."""
        return range_of(self.start, self.end, lambda time: level_of(schedule(time, shift)))


def level_of(log_snr: Tensor) -> Tensor:
    """Noise as ComfyUI measures it: sigma = b / a."""
    return (log_snr / -2).exp()


def load_controlnet(path: Path, device: ComputeDevice) -> ControlNetStage:
    """A ControlNet from a file of any layout."""
    network, _, _ = load_model(path, expect="controlnet", dtype=torch.float32, placed=device.places)
    return ControlNetStage(network, path.name, device)


class RunControls:
    """The ControlNets of one run on Stage C: first checked, then computed once, one after the other on the device."""

    def __init__(
        self, stage_c: Any, run: SamplingRun, applied: Sequence[AppliedControlNet], observer: RunObserver
    ):
        widths = residual_blocks(stage_c)
        for one in applied:
            config, file = one.stage.network.config, one.stage.file
            check_blocks(config, file, widths)
            check_hint(config, file, one.hint.shape[1])
        levels = [level_of(log_snr) for log_snr in run.log_snrs()[:-1]]
        self.observer = observer
        self.ranges = {one: one.levels(run.shift) for one in applied}
        self.residuals = {
            one: self._compute(one, run.latent)
            for one, between in self.ranges.items()
            if any(is_on(level, *between) for level in levels)
        }

    def _compute(self, applied: AppliedControlNet, latent: Tensor) -> Residuals:
        self.observer.check_interrupted()
        network = applied.stage.network
        hint = fit_hint(applied.hint, network.config, (latent.shape[-2], latent.shape[-1]))
        values = activations.controlnet(network.config, len(hint), *hint.shape[-2:])
        residuals = applied.stage.device.run(network, lambda device: network(hint.to(device)), 4 * values)
        return [None if residual is None else for_batch(residual, len(latent)) for residual in residuals]

    def active_at(self, log_snr: Tensor) -> frozenset[AppliedControlNet]:
        """The ControlNets that are on at a noise level, a tensor with one element."""
        level = level_of(log_snr.cpu())
        return frozenset(one for one in self.residuals if is_on(level, *self.ranges[one]))

    def merged(
        self, applied: Sequence[AppliedControlNet], active: frozenset[AppliedControlNet]
    ) -> Residuals | None:
        """The summed residuals of those of a prompt's ControlNets that are on; None if there are none."""
        merged: Residuals = []
        for one in applied:
            if one in active:
                add_residuals(merged, self.residuals[one], one.strength)
        return merged or None
