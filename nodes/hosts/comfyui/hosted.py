"""A network of ours as ComfyUI holds it."""

from typing import Any

from torch import nn


class Hosted(nn.Module):
    """Shares a network's children under their own names, so that the host finds the published names in its
    state dict (weight patches and LoRA go by them), while the network itself stays out of the way.

    Subclasses add the calls that the host makes.
    """

    network: Any

    def __init__(self, network: nn.Module):
        super().__init__()
        # The same dicts, not copies: what the host replaces in one is replaced in the other.
        self._modules, self._parameters, self._buffers = (
            network._modules,
            network._parameters,
            network._buffers,
        )
        self.__dict__["network"] = network  # past nn.Module, which would register it as a child
        self.eval().requires_grad_(False)
