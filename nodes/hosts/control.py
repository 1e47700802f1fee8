"""Description of a CONTROL_NET, the same for both hosts."""

from dataclasses import dataclass

from ...cascade_core.networks.config import ControlNetConfig


@dataclass(frozen=True)
class ControlNetDescription:
    """Contents of a CONTROL_NET.

    name     of its file, or in words
    cascade  whether it is a ControlNet for Stage C
    config   of a network of ours, None for ComfyUI's own
    """

    name: str
    cascade: bool
    config: ControlNetConfig | None
