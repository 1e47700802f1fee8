"""Whether a network's weights are still what the engine derived its own values from, and such as it can read."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

from torch import Tensor, nn


class Weights:
    """A network's parameters as they were when something was derived from them."""

    def __init__(self, network: nn.Module):
        self.modules = list(network.modules())
        self.stamps = [_stamp(p) for p in self._parameters()]

    def _parameters(self) -> Iterator[Tensor]:
        for module in self.modules:
            for parameter in module._parameters.values():
                if parameter is not None:
                    yield parameter

    def unchanged(self) -> bool:
        """Whether every parameter is the same tensor, at the same address, and was not written to since."""
        return all(
            ref() is p and (address, version) == _stamp(p)[1:]
            for p, (ref, address, version) in zip(self._parameters(), self.stamps, strict=True)
        )

    def plain(self, x: Tensor) -> bool:
        """Whether they lie on x's device in its precision, and no layer does more than its kind says."""
        return all(p.device == x.device and p.dtype == x.dtype for p in self._parameters()) and not any(
            module._forward_pre_hooks
            or module._forward_hooks
            or getattr(module, "comfy_cast_weights", False)
            or getattr(module, "weight_function", None)
            for module in self.modules
        )


def _stamp(parameter: Tensor) -> tuple[weakref.ref, int, int]:
    version = 0 if parameter.is_inference() else parameter._version
    return weakref.ref(parameter), parameter.data_ptr(), version
