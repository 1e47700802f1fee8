# pyright: reportMissingImports=false
"""ComfyUI's weight patches (LoRAs, merges, hooks) as changes of a placement's weights."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any
from zlib import crc32

import comfy.float
import comfy.lora
import comfy.weight_adapter
import torch
from torch import Tensor

from ....cascade_core.errors import CascadeError
from ....cascade_core.placement import Placement, Unit

SCRATCH = 3  # number of float32 copies of a weight that exist at once while it is patched
PREFIX = "diffusion_model."  # prefix of a network's names in a BaseModel
Patches = Mapping[str, Sequence[tuple]]  # a weight's name in the BaseModel -> its patches, in their order


class PatchedWeight:
    """The patches of one weight.

    steps: the host's tuples (strength, patch, strength of the model, offset, function).
    """

    def __init__(self, key: str, steps: Sequence[tuple], weight: Tensor):
        self.key, self.steps = key, tuple(steps)
        size = sum(tensor.nbytes for tensor in _tensors(self.steps))
        # Bytes of factors that stay on the device for a weight streamed at every forward. Larger factors, such as
        # those of a merged model, do not stay: they would take as much memory as the weights.
        self.factor_bytes = size if size <= weight.nbytes // 4 else 0
        self._steps_there: Sequence[tuple] = self.steps
        self.device_bytes = 0  # of factors now on the device

    def keep_on(self, device: torch.device) -> None:
        """Keeps small factors on the device."""
        if self.factor_bytes and not self.device_bytes:
            self._steps_there = [_on_device(step, device) for step in self.steps]
            self.device_bytes = self.factor_bytes

    def drop(self) -> None:
        """Frees the factors on the device."""
        self._steps_there, self.device_bytes = self.steps, 0

    def apply(self, weight: Tensor) -> Tensor:
        """The patched weight in its own dtype, computed in float32 and rounded as the host does.

        Raises CascadeError for patches that change its shape.
        """
        # Where memory is short, the host's adapters only log it and leave the weight unpatched; so fail here instead.
        torch.empty(SCRATCH * weight.numel(), dtype=torch.float32, device=weight.device)
        # A patch that holds another model's weight adds its difference from this one.
        original = {self.key: [(weight, _unchanged)]}
        copied = weight.to(torch.float32, copy=True)
        changed = comfy.lora.calculate_weight(
            self._steps_there, copied, self.key, intermediate_dtype=torch.float32, original_weights=original
        )
        if changed.shape != weight.shape:
            raise CascadeError(
                f"A patch makes {self.key} a weight of {tuple(changed.shape)}, but it is {tuple(weight.shape)} here; "
                "choose a LoRA that was made for this model."
            )
        seed = crc32(self.key.encode())  # the host's seed, which versions keep in different places
        return comfy.float.stochastic_rounding(changed, weight.dtype, seed=seed)


class PatchKey:
    """Identity of a unit's patches; equal for equal patches, since clones of a MODEL share parts of them."""

    def __init__(self, changes: Mapping[int, PatchedWeight]):
        self._steps = {index: change.steps for index, change in changes.items()}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PatchKey) or self._steps.keys() != other._steps.keys():
            return False
        return all(_same(steps, other._steps[index]) for index, steps in self._steps.items())

    __hash__ = None  # type: ignore[assignment]


UnitPatches = dict[Unit, dict[int, PatchedWeight]]


def by_unit(placement: Placement, patches: Patches) -> UnitPatches:
    """The patches of a placement's weights, by unit and index; others are left out."""
    grouped: UnitPatches = {}
    for key, steps in patches.items():
        location = placement.locations.get(key.removeprefix(PREFIX))
        if location is not None and steps:
            unit, index = location
            grouped.setdefault(unit, {})[index] = PatchedWeight(key, steps, unit.host_tensors[index])
    return grouped


def unchanged_kept(before: UnitPatches, after: UnitPatches) -> UnitPatches:
    """`after`, in which objects of `before` replace those that are equal."""
    return {
        unit: {index: _kept(before.get(unit, {}).get(index), weight) for index, weight in weights.items()}
        for unit, weights in after.items()
    }


def _kept(before: PatchedWeight | None, after: PatchedWeight) -> PatchedWeight:
    return before if before is not None and _same(before.steps, after.steps) else after


def keys_of(patches: UnitPatches) -> dict[Unit, PatchKey]:
    """The key of each unit's patches."""
    return {unit: PatchKey(each) for unit, each in patches.items()}


def _unchanged(weight: Tensor, **_: Any) -> Tensor:
    return weight


def _same(steps: Sequence[tuple], others: Sequence[tuple]) -> bool:
    return len(steps) == len(others) and all(map(_same_step, steps, others))


def _same_step(step: tuple, other: tuple) -> bool:
    """Whether two steps are the same: tensors and adapters by identity, strengths by value."""
    return step is other or (
        len(step) == len(other)
        and all(a is b or (isinstance(a, int | float) and a == b) for a, b in zip(step, other, strict=True))
    )


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested patches."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, comfy.weight_adapter.WeightAdapterBase):
        return _tensors(value.weights)
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, list | tuple) else []


def _on_device(value: Any, device: torch.device) -> Any:
    """The same patches with their tensors on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, comfy.weight_adapter.WeightAdapterBase):
        moved = copy.copy(value)
        moved.weights = _on_device(value.weights, device)
        return moved
    if isinstance(value, list | tuple):
        return type(value)(_on_device(part, device) for part in value)
    return value
