"""Whether a network's weights are still what the engine derived its own values from, and such as it can read.

Asked before every forward, of thousands of parameters and modules: so what is looked at is gathered once.
"""

from __future__ import annotations

import weakref
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn


class Weights:
    """A network's parameters as they were when something was derived from them."""

    def __init__(self, network: nn.Module):
        modules = list(network.modules())
        # The dicts in which modules keep parameters and hooks stay the same ones; what they hold may be replaced.
        self._places = [
            (m._parameters, name) for m in modules for name, p in m._parameters.items() if p is not None
        ]
        self._hooks = [hooks for m in modules for hooks in (m._forward_pre_hooks, m._forward_hooks)]
        self._cast = [m for m in modules if hasattr(m, "comfy_cast_weights") or hasattr(m, "weight_function")]
        parameters = self._parameters()
        self._references = [weakref.ref(p) for p in parameters]
        self._addresses, self._versions = _addresses(parameters), _versions(parameters)
        self._stand = {(p.device, p.dtype) for p in parameters}

    def _parameters(self) -> list[Any]:
        return [parameters.get(name) for parameters, name in self._places]

    def unchanged(self) -> bool:
        """Whether every parameter is the same tensor, at the same address, and was not written to since."""
        parameters = self._parameters()
        return (
            all(map(is_, parameters, [reference() for reference in self._references]))
            and _addresses(parameters) == self._addresses
            and _versions(parameters) == self._versions
        )

    def plain(self, x: Tensor) -> bool:
        """Whether they lie on x's device in its precision, and no layer does more than its kind says."""
        return (
            self._stand == {(x.device, x.dtype)}
            and not any(self._hooks)
            and not any(
                getattr(m, "comfy_cast_weights", False) or getattr(m, "weight_function", None)
                for m in self._cast
            )
        )


def _addresses(parameters: list) -> list[int]:
    return list(map(torch.Tensor.data_ptr, parameters))


def _versions(parameters: list) -> list[int]:
    """Of tensors made in inference mode there are none."""
    return [0 if p.is_inference() else p._version for p in parameters]
