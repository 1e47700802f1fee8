"""Checks whether a network's weights are still those that the engine derived values from, and whether it can read them.

This is checked before every forward, for thousands of parameters and modules, so all look-ups are done once beforehand.
"""

from __future__ import annotations

import weakref
from itertools import repeat
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from ..networks.quantisation import is_quantised
from ..placement.stream import WeightStream

UNKNOWN = -1  # version of a tensor made in inference mode, which has no counter


class WeightSnapshot:
    """A network's parameters as they were when values were derived from them."""

    def __init__(self, network: nn.Module):
        modules = list(network.modules())
        # The dicts in which modules keep parameters and hooks stay the same objects; their entries may be replaced.
        self._entries = [
            (m._parameters, name) for m in modules for name, p in m._parameters.items() if p is not None
        ]
        self._quantised = [
            is_quantised(m, name) for m in modules for name, p in m._parameters.items() if p is not None
        ]
        self._hooks = [hooks for m in modules for hooks in (m._forward_pre_hooks, m._forward_hooks)]
        self._cast = [m for m in modules if hasattr(m, "comfy_cast_weights") or hasattr(m, "weight_function")]
        parameters = self._parameters()
        self._references = [weakref.ref(p) for p in parameters]
        self._versions = _versions(parameters)
        self._locate(parameters)

    def _parameters(self) -> list[Any]:
        return [parameters.get(name) for parameters, name in self._entries]

    def _locate(self, parameters: list[Any]) -> None:
        self._addresses = _addresses(parameters)
        # 8-bit weights are read in any dtype of x.
        self._devices = {p.device for p in parameters}
        self._dtypes = {
            p.dtype for p, quantised in zip(parameters, self._quantised, strict=True) if not quantised
        }

    def unchanged(self) -> bool:
        """Whether every parameter is the same tensor, at the same address, and was not written to since."""
        parameters = self._parameters()
        return self._same_values(parameters) and _addresses(parameters) == self._addresses

    def same_values(self) -> bool:
        """`unchanged`, wherever the parameters are: placement moves them without changing them."""
        return self._same_values(self._parameters())

    def _same_values(self, parameters: list[Any]) -> bool:
        if not all(map(is_, parameters, [reference() for reference in self._references])):
            return False
        versions = _versions(parameters)
        if versions == self._versions:
            return True
        # Placement's copies on a device have no version, so the last known one is used.
        if any(
            UNKNOWN not in pair and pair[0] != pair[1] for pair in zip(versions, self._versions, strict=True)
        ):
            return False
        self._versions = list(map(max, versions, self._versions))
        return True

    def moved(self) -> bool:
        """Whether any parameter is at another address than at the last call."""
        parameters = self._parameters()
        if _addresses(parameters) == self._addresses:
            return False
        self._locate(parameters)
        return True

    def readable(self, x: Tensor, stream: WeightStream | None = None) -> bool:
        """Whether the weights are on x's device in its dtype, and no hook or host changes them as they are used.

        stream: brings the weights to the device, by hooks of its own, or None where they are resident
        """
        if stream is None:
            plain = (self._devices, self._dtypes) == ({x.device}, {x.dtype}) and not any(self._hooks)
        else:
            plain = stream.streams_to(x.device, x.dtype, self._hooks)
        return plain and not any(
            getattr(m, "comfy_cast_weights", False) or getattr(m, "weight_function", None) for m in self._cast
        )


class OwnModules:
    """A network's original blocks and layers, to detect that a host replaced one of them, or its forward."""

    def __init__(self, network: nn.Module):
        modules = list(network.named_modules())
        # The dicts stay the same objects here too. A forward set on a block takes precedence over its class's. The
        # network itself is left out, since its forward is called in place of the engine.
        self._modules = modules[1:]
        self._attributes = [m.__dict__ for _, m in self._modules]
        self._dicts = [m._modules for _, m in modules for _ in m._modules]
        self._names = [name for _, m in modules for name in m._modules]
        self._original = [child for _, m in modules for child in m._modules.values()]
        self._paths = [f"{path}.{name}".lstrip(".") for path, m in modules for name in m._modules]

    def replaced(self) -> str | None:
        """Name of the first module that is not the network's own, or None."""
        children = list(map(dict.get, self._dicts, self._names))
        if not all(map(is_, children, self._original)):
            same = map(is_, children, self._original)
            return next(path for path, same in zip(self._paths, same, strict=True) if not same)
        if any(map(dict.__contains__, self._attributes, repeat("forward"))):
            return next((path for path, module in self._modules if _forward_replaced(module)), None)
        return None


def _forward_replaced(module: nn.Module) -> bool:
    """Whether a module's forward is not its class's; a host that restores the original leaves it as an attribute."""
    forward = module.__dict__.get("forward")
    if forward is None:
        return False
    bound_to, function = getattr(forward, "__self__", None), getattr(forward, "__func__", None)
    return bound_to is not module or function is not type(module).forward


def _addresses(parameters: list) -> list[int]:
    return list(map(torch.Tensor.data_ptr, parameters))


def _versions(parameters: list) -> list[int]:
    return [UNKNOWN if p.is_inference() else p._version for p in parameters]
