"""CONTROL_NET without ComfyUI: a ControlNet of ours, and what it was loaded from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ....cascade_core import checkpoints


@dataclass(frozen=True)
class HeadlessControlNet:
    """A ControlNet in evaluation mode, in main memory."""

    network: Any  # ControlNet
    file: str

    def networks(self) -> list[tuple[nn.Module, str]]:
        """The network with the name of its file."""
        return [(self.network, self.file)]


def load_controlnet(path: Path) -> HeadlessControlNet:
    network, _, _ = checkpoints.load_model(path, expect="controlnet", dtype=torch.float32)
    return HeadlessControlNet(network, path.name)
