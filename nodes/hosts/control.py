"""What the nodes ask of a CONTROL_NET, whichever host made it."""

from dataclasses import dataclass

from ...cascade_core.networks.config import ControlNetConfig


@dataclass(frozen=True)
class Control:
    """What a CONTROL_NET holds.

    name     of its file, or in words
    cascade  whether it is for Stage C
    config   of a network of ours, None for ComfyUI's own
    """

    name: str
    cascade: bool
    config: ControlNetConfig | None
