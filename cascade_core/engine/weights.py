"""Whether a network's weights are still what the engine derived its own values from, and such as it can read.

Asked before every forward, of thousands of parameters and modules: so what is looked at is gathered once.
"""

from __future__ import annotations

import weakref
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

UNKNOWN = -1  # version


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
        self._versions = _versions(parameters)
        self._look(parameters)

    def _parameters(self) -> list[Any]:
        return [parameters.get(name) for parameters, name in self._places]

    def _look(self, parameters: list[Any]) -> None:
        self._addresses = _addresses(parameters)
        self._stand = {(p.device, p.dtype) for p in parameters}

    def unchanged(self) -> bool:
        """Whether every parameter is the same tensor, at the same address, and was not written to since."""
        parameters = self._parameters()
        return self._same(parameters) and _addresses(parameters) == self._addresses

    def same(self) -> bool:
        """The same of a network that placement moves about, wherever they lie: what it moves it does not change."""
        return self._same(self._parameters())

    def _same(self, parameters: list[Any]) -> bool:
        if not all(map(is_, parameters, [reference() for reference in self._references])):
            return False
        versions = _versions(parameters)
        if versions == self._versions:
            return True
        # On a device that placement brings them to they have no version; the last one that was known counts.
        if any(
            UNKNOWN not in pair and pair[0] != pair[1] for pair in zip(versions, self._versions, strict=True)
        ):
            return False
        self._versions = list(map(max, versions, self._versions))
        return True

    def moved(self) -> bool:
        """Whether any parameter lies elsewhere than when this was last asked."""
        parameters = self._parameters()
        if _addresses(parameters) == self._addresses:
            return False
        self._look(parameters)
        return True

    def plain(self, x: Tensor, arrivals: Any = None) -> bool:
        """Whether they lie on x's device in its precision, and no layer does more than its kind says.

        arrivals: what brings weights there as they are used (placement/stream.py), if anything does, by its own hooks.
        """
        if arrivals is None:
            there = self._stand == {(x.device, x.dtype)} and not any(self._hooks)
        else:
            there = {dtype for _, dtype in self._stand} == {x.dtype} and arrivals.streams_to(
                x.device, self._hooks
            )
        return there and not any(
            getattr(m, "comfy_cast_weights", False) or getattr(m, "weight_function", None) for m in self._cast
        )


def _addresses(parameters: list) -> list[int]:
    return list(map(torch.Tensor.data_ptr, parameters))


def _versions(parameters: list) -> list[int]:
    """Of tensors made in inference mode there are none."""
    return [UNKNOWN if p.is_inference() else p._version for p in parameters]
