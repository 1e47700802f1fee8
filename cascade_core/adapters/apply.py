"""Applies adapters to a network: for a while, by patching its weights, or weight by weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import CascadeError, printable
from .adapter import LowRank


@dataclass(frozen=True, eq=False)
class Patch:
    """Changes of one network by one adapter.

    name      of its file, for messages
    changes   by module name
    strength  of all of them: 0 is none, negative is the opposite
    """

    name: str
    changes: Mapping[str, LowRank]
    strength: float = 1.0


def changed_weight(weight: Tensor, change: LowRank, strength: float) -> Tensor:
    """Applies one change: W + strength · (W' − W) in float32, W' being the weight with the change at full strength.

    weight: (c_out, c_in) or (c_out, c_in, k, k), of any dtype. For a plain LoRA this is W + strength · ΔW. DoRA's W'
    (Liu et al. 2024, arXiv 2402.09353) has its own magnitudes, so that strength moves between W and it, as in ComfyUI.
    """
    weight = weight.float()
    change = replace(change, up=change.up.to(weight.device), down=change.down.to(weight.device))
    delta = change.delta(weight.shape)
    if change.magnitude is None:
        return torch.add(weight, delta, alpha=strength)
    return torch.lerp(weight, decomposed(weight + delta, change.magnitude), strength)


def decomposed(weight: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA's magnitude · weight / ‖weight‖, normed over each row or each column, by the magnitude's shape."""
    axis = 0 if _by_row(weight, magnitude) else 1  # the dimension that the magnitudes go along
    normed = [dim for dim in range(weight.ndim) if dim != axis]
    norm = torch.linalg.vector_norm(weight, dim=normed, keepdim=True)
    magnitude = magnitude.to(weight.device, torch.float32).view(norm.shape)
    return weight * (magnitude / norm.clamp_min(torch.finfo(torch.float32).eps))


def _by_row(weight: Tensor, magnitude: Tensor) -> bool:
    return len(magnitude) == magnitude.numel() == len(weight)


@contextmanager
def patched(
    network: nn.Module, patches: Sequence[Patch], device: torch.device | None = None
) -> Iterator[None]:
    """Applies patches to a network's weights inside the block; restores the very same tensors after it.

    Patches are applied one after the other; their order matters to DoRA alone. Each changed weight is computed in
    float32, cast to the weight's own dtype and placed on `device` (None: that of the weight). Nothing else is copied.
    Not thread-safe: the network itself is changed.

    Raises CascadeError for a change that the network has no layer for, or one of another shape.
    """
    originals: list[tuple[nn.Module, nn.Parameter]] = []
    try:
        for name, steps in changes_by_layer(patches).items():
            layer, original = layer_of(network, name, steps[0][0])
            check_shape(original.shape, name, steps)
            weight = apply_steps(original.detach().to(device or original.device), steps)
            originals.append((layer, original))
            layer.weight = nn.Parameter(weight.to(original.dtype), requires_grad=False)
        yield
    finally:
        for layer, original in originals:
            layer.weight = original


Steps = list[tuple[Patch, LowRank]]  # what patches do to one layer, in their order


def changes_by_layer(patches: Sequence[Patch]) -> dict[str, Steps]:
    """Groups the changes of all patches by the layer that they change; patches of strength 0 are left out."""
    layers: dict[str, Steps] = {}
    for patch in patches:
        if patch.strength != 0:
            for name, change in patch.changes.items():
                layers.setdefault(name, []).append((patch, change))
    return layers


def check_shape(shape: Sequence[int], name: str, steps: Steps) -> None:
    """Raises CascadeError, naming the patch, where a change does not have the shape of the layer's weight."""
    for patch, change in steps:
        if not change.fits(torch.Size(shape)):
            raise CascadeError(
                f"{patch.name} changes {name} as a weight of {change.delta_shape}, but it is {tuple(shape)} "
                "here; choose the LoRA that was trained for this model."
            )


@torch.no_grad()
def apply_steps(weight: Tensor, steps: Steps) -> Tensor:
    """A layer's weight with all its changes applied, in float32."""
    for patch, change in steps:
        weight = changed_weight(weight, change, patch.strength)
    return weight


def layer_of(network: nn.Module, name: str, patch: Patch) -> tuple[nn.Module, nn.Parameter]:
    """The layer of that name and its weight. Raises CascadeError, naming the patch, if the network has none."""
    try:
        layer = network.get_submodule(name)
    except AttributeError:
        layer = None
    weight = getattr(layer, "weight", None)
    if layer is None or not isinstance(weight, nn.Parameter):
        raise CascadeError(
            f"{patch.name} changes {printable(name)}, which this model does not have; choose the LoRA that was "
            "trained for it."
        )
    return layer, weight
