"""CONTROL_NET without ComfyUI: a ControlNet of the core.

A prompt holds under `control` the ControlNets that were applied to it, in a tuple of `AppliedControlNet`.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from ....cascade_core.stages import control
from ....cascade_core.stages.control import AppliedControlNet, ControlNetStage
from ..control import ControlNetDescription
from .device import compute_device
from .values import words_for


def load_controlnet(path: Path) -> ControlNetStage:
    return control.load_controlnet(path, compute_device())


def describe_controlnet(control_net: Any) -> ControlNetDescription:
    if not isinstance(control_net, ControlNetStage):
        return ControlNetDescription(words_for(control_net), False, None)
    return ControlNetDescription(control_net.file, True, control_net.network.config)


def apply_controlnet(
    positive: list,
    negative: list,
    control_net: ControlNetStage,
    hint: Tensor,
    strength: float,
    start: float,
    end: float,
) -> tuple[list, list]:
    applied = AppliedControlNet(control_net, hint.movedim(-1, 1), strength, start, end)

    def with_it(conditioning: list) -> list:
        return [
            [states, {**values, "control": (*values.get("control", ()), applied)}]
            for states, values in conditioning
        ]

    return with_it(positive), with_it(negative)
