"""How much memory tensors take at the most while something runs."""

import weakref
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside the block `peak` is the largest number of bytes that tensors made there held at once.

    What the given networks hold is not counted.
    """

    def __init__(self, *networks: nn.Module):
        super().__init__()
        weights = [tensor for network in networks for tensor in network.state_dict().values()]
        self.live = {tensor.untyped_storage().data_ptr(): 0 for tensor in weights}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                place = storage.data_ptr()
                if place and place not in self.live:
                    self.live[place] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, place)
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, place: int) -> None:
        self.now -= self.live.pop(place)
