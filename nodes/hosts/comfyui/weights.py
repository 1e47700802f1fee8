"""Search for non-finite weights of a MODEL, CLIP, VAE or CLIP_VISION."""

from operator import attrgetter
from typing import Any

from torch import nn

from ....cascade_core import checkpoints

# Attribute paths of the network in each kind of value, the most specific first.
_NETWORK_PATHS = ("model.diffusion_model", "first_stage_model", "cond_stage_model", "model")
_FILE = "cascade_file"


def remember_file(value: Any, name: str) -> None:
    """Records the file that a value's network came from; copies of the value share the network."""
    setattr(_network(value), _FILE, name)


def first_non_finite(value: Any) -> str | None:
    network = _network(value)
    weight = checkpoints.first_non_finite(network)
    file = getattr(network, _FILE, f"the connected {type(value).__name__}")
    return None if weight is None else f"{weight} of {file}"


def _network(value: Any) -> nn.Module:
    for path in _NETWORK_PATHS:
        try:
            network = attrgetter(path)(value)
        except AttributeError:
            continue
        if isinstance(network, nn.Module):
            return network
    raise TypeError(f"{type(value).__name__} holds no network.")
