"""Wrappers of our networks for ComfyUI."""

from functools import cache
from typing import Any

from torch import nn


class Hosted(nn.Module):
    """Wrapper that shares a network's children under their own names, so that the host finds the published names in
    its state dict, which weight patches and LoRAs use.

    Subclasses add the calls that the host makes.
    """

    network: Any

    def __init__(self, network: nn.Module):
        super().__init__()
        # The same dicts, not copies, so that a replacement by the host takes effect in both.
        self._modules, self._parameters, self._buffers = (
            network._modules,
            network._parameters,
            network._buffers,
        )
        self.__dict__["network"] = network  # bypasses nn.Module, which would register it as a child
        self.eval().requires_grad_(False)


class WholeLayers:
    """Host's layers that own their weights from construction.

    Under dynamic VRAM (newer versions) its Linear and Embedding have none until a state dict is loaded, but ours are
    compared with the file before that. The host does not change a subclass that loads its state dict itself.
    """

    def __init__(self, operations: Any):
        self._operations = operations
        self.Linear, self.Embedding = _whole(operations.Linear), _whole(operations.Embedding)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._operations, name)


@cache
def _whole(layer: type[nn.Module]) -> type[nn.Module]:
    return type(layer.__name__, (layer,), {"_load_from_state_dict": nn.Module._load_from_state_dict})
