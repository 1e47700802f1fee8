"""Applies adapters to a network: temporarily, by patching its weights, or weight by weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CascadeError, printable
from ..networks.quantisation import is_quantised, quantise
from .changes import Change
from .names import parameter_name


@dataclass(frozen=True, eq=False)
class Patch:
    """Changes of one network by one adapter.

    name      of its file, for messages
    changes   by the name of a layer, whose weight is changed, or of another parameter
    strength  of all changes: 0 is none, negative is the opposite
    """

    name: str
    changes: Mapping[str, Change]
    strength: float = 1.0


def changed_weight(weight: Tensor, change: Change, strength: float) -> Tensor:
    """Applies one change: W + strength · (W' − W) in float32, W' being the weight with the change at full strength.

    weight: of any dtype. For a plain LoRA this is W + strength · ΔW. DoRA's W' (Liu et al. 2024, arXiv 2402.09353) has
    its own magnitudes, so strength interpolates between W and W', as in ComfyUI.
    """
    there = {name: tensor.to(weight.device) for name, tensor in change.tensors().items()}
    return change.with_tensors(there).apply(weight.float(), strength)


@contextmanager
def patched(
    network: nn.Module, patches: Sequence[Patch], device: torch.device | None = None
) -> Iterator[None]:
    """Applies patches to a network's weights inside the block; restores the very same tensors after it.

    Patches are applied one after the other; their order matters where a change is not a plain sum, as with DoRA. Each
    changed weight is computed in float32, cast to the weight's own dtype and placed on `device` (None: that of the
    weight). An 8-bit weight is computed anew from its original and quantised once. Nothing else is copied. Not
    thread-safe: the network itself is changed.

    Raises CascadeError for a change that the network has no layer for, or one of another shape.
    """
    originals: list[tuple[nn.Module, str, Any]] = []
    try:
        for target, steps in changes_by_target(patches).items():
            layer, name, original = parameter_of(network, target, steps[0][0])
            check_shape(original.shape, target, steps)
            home = device or original.device
            originals.append((layer, name, original))
            if is_quantised(layer, name):
                originals.append((layer, "weight_scale", layer.weight_scale))
                layer.put(quantise(apply_steps(layer.original_values(home), steps), original.dtype))
                continue
            weight = apply_steps(original.detach().to(home), steps)
            setattr(layer, name, nn.Parameter(weight.to(original.dtype), requires_grad=False))
        yield
    finally:
        for layer, name, original in originals:
            setattr(layer, name, original)


Steps = list[tuple[Patch, Change]]  # the changes of one parameter, in the order of the patches


def changes_by_target(patches: Sequence[Patch]) -> dict[str, Steps]:
    """Groups the changes of all patches by what they change; patches of strength 0 are left out."""
    targets: dict[str, Steps] = {}
    for patch in patches:
        if patch.strength != 0:
            for target, change in patch.changes.items():
                targets.setdefault(target, []).append((patch, change))
    return targets


def check_shape(shape: Sequence[int], name: str, steps: Steps) -> None:
    """Raises CascadeError, naming the patch, where a change does not have the shape of the parameter."""
    for patch, change in steps:
        if not change.fits(torch.Size(shape)):
            raise CascadeError(
                f"{patch.name} changes {name} as a weight of {change.shape}, but it is {tuple(shape)} "
                "here; choose the LoRA that was trained for this model."
            )


@torch.no_grad()
def apply_steps(weight: Tensor, steps: Steps) -> Tensor:
    """A parameter with all its changes applied, in float32."""
    for patch, change in steps:
        weight = changed_weight(weight, change, patch.strength)
    return weight


def parameter_of(network: nn.Module, target: str, patch: Patch) -> tuple[Any, str, nn.Parameter]:
    """(layer, name of the parameter in it, the parameter) of a target: a layer's name, which stands for its weight,
    or another parameter's name. Raises CascadeError, naming the patch, if the network has no such parameter.
    """
    path, _, name = parameter_name(target).rpartition(".")
    try:
        layer = network.get_submodule(path)
    except AttributeError:
        layer = None
    parameter = getattr(layer, name, None)
    if layer is not None and isinstance(parameter, nn.Parameter):
        return layer, name, parameter
    raise CascadeError(
        f"{patch.name} changes {printable(target)}, which this model does not have; choose the LoRA that was trained "
        "for it."
    )
