"""CONTROL_NET without ComfyUI: a ControlNet of ours, what it was loaded from, and its part in a sampling run.

A prompt holds under `control` the ControlNets that were applied to it, in a tuple of `Applied`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....cascade_core import checkpoints
from ....cascade_core.diffusion.schedule import log_snr as schedule
from ....cascade_core.hints.control import (
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
from ....cascade_core.networks import activations
from ..control import Control
from ..reporting import check_interrupted
from ..run import Run
from .device import on_device


@dataclass(frozen=True)
class HeadlessControlNet:
    """A ControlNet in evaluation mode, in main memory or on the device."""

    network: Any  # ControlNet
    file: str

    def networks(self) -> list[tuple[nn.Module, str]]:
        """The network with the name of its file."""
        return [(self.network, self.file)]


@dataclass(frozen=True, eq=False)
class Applied:
    """A ControlNet with its hint (B, C, H, W), strength, and range as shares of the schedule."""

    control_net: HeadlessControlNet
    hint: Tensor
    strength: float
    start: float
    end: float

    def levels(self, shift: float) -> tuple[float, float]:
        """The levels of noise that it is on for, from the first to the last."""
        return range_of(self.start, self.end, lambda time: level_of(schedule(time, shift)))


def level_of(log_snr: Tensor) -> Tensor:
    """Noise as ComfyUI measures it: sigma = b / a."""
    return (log_snr / -2).exp()


def load_controlnet(path: Path) -> HeadlessControlNet:
    network, _, _ = checkpoints.load_model(path, expect="controlnet", dtype=torch.float32)
    return HeadlessControlNet(network, path.name)


def describe_controlnet(control_net: Any) -> Control:
    if not isinstance(control_net, HeadlessControlNet):
        return Control(f"a {type(control_net).__name__}", False, None)
    return Control(control_net.file, True, control_net.network.config)


def apply_controlnet(
    positive: list,
    negative: list,
    control_net: HeadlessControlNet,
    hint: Tensor,
    strength: float,
    start: float,
    end: float,
) -> tuple[list, list]:
    applied = Applied(control_net, hint.movedim(-1, 1), strength, start, end)

    def with_it(conditioning: list) -> list:
        return [
            [tokens, {**values, "control": (*values.get("control", ()), applied)}]
            for tokens, values in conditioning
        ]

    return with_it(positive), with_it(negative)


class RunControls:
    """The ControlNets of one run on Stage C: checked first, then computed once, each on the device by itself."""

    def __init__(self, run: Run, prompts: list[list]):
        applied = [one for prompt in prompts for _, values in prompt for one in values.get("control", ())]
        widths = residual_blocks(run.model.network)
        for one in applied:
            config, file = one.control_net.network.config, one.control_net.file
            check_blocks(config, file, widths)
            check_hint(config, file, one.hint.shape[1])
        levels = [level_of(log_snr) for log_snr in run.log_snrs()[:-1]]
        self.ranges = {one: one.levels(run.shift) for one in applied}
        self.residuals = {
            one: self._compute(one, run.samples)
            for one, between in self.ranges.items()
            if any(is_on(level, *between) for level in levels)
        }

    @staticmethod
    def _compute(one: Applied, latent: Tensor) -> Residuals:
        check_interrupted()
        network = one.control_net.network
        hint = fit_hint(one.hint, network.config, (latent.shape[-2], latent.shape[-1]))
        values = activations.controlnet(network.config, len(hint), *hint.shape[-2:])
        residuals = on_device(network, lambda device: network(hint.to(device)), 4 * values)
        return [None if residual is None else for_batch(residual, len(latent)) for residual in residuals]

    def on_at(self, log_snr: Tensor) -> frozenset[Applied]:
        """Those that are on at a level of noise, a tensor of one number."""
        level = level_of(log_snr.cpu())
        return frozenset(one for one in self.residuals if is_on(level, *self.ranges[one]))

    def merged(self, prompt: list, on: frozenset[Applied]) -> Residuals | None:
        """The residuals of a prompt's ControlNets, of those that are on; None where none is."""
        merged: Residuals = []
        for one in (one for _, values in prompt for one in values.get("control", ()) if one in on):
            add_residuals(merged, self.residuals[one], one.strength)
        return merged or None
