"""A network's file with adapters baked into its weights, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..checkpoints import Layout, split_attention
from ..checkpoints.attention import FUSED, THIRDS
from ..checkpoints.pages import forget_pages, mapped_files
from ..checkpoints.quantised import is_beside, requantised, rescaled, scale_name, written_layout
from ..errors import CascadeError, printable
from .apply import Patch, Steps, apply_steps, changes_by_target, check_shape
from .names import parameter_name


@dataclass(frozen=True)
class EightBit:
    """The weights that become 8-bit: `matrices` of a network, by their published names with split attention."""

    dtype: torch.dtype | None
    matrices: Collection[str] = ()

    def of(self, tensor: Tensor, published: str) -> torch.dtype | None:
        """The format that a tensor of a file becomes; None: it stays as it is."""
        return self.dtype if published in self.matrices and tensor.dtype != self.dtype else None

    def stale(self, tensors: Mapping[str, Tensor], layout: Layout) -> set[str]:
        """Names of tensors that describe the former 8-bit format of such weights."""
        weights = {name: f"{name.rpartition('.')[0]}.weight" for name in tensors if is_beside(name)}
        return {
            name
            for name, weight in weights.items()
            if weight in tensors and self.of(tensors[weight], layout.published_name(weight) or "")
        }


@dataclass(frozen=True)
class _Weight:
    """A tensor of the file, or a third of a fused one.

    name    in the new file
    turned  whether it is stored transposed
    steps   the changes of each equal part of its rows
    """

    name: str
    stored: Tensor
    turned: bool
    steps: Sequence[Steps]

    def values(self) -> Tensor:
        """Values with all changes applied, in float32."""
        rows = (self.stored.T if self.turned else self.stored).chunk(len(self.steps))
        merged = [apply_steps(part, steps).float() for part, steps in zip(rows, self.steps, strict=True)]
        whole = merged[0] if len(merged) == 1 else torch.cat(merged)
        return whole.T if self.turned else whole


class MergedFile:
    """A file's contents after patching: `tensors` on the meta device, and the `value` of each on request.

    Each changed weight is computed in float32 and cast back to its own dtype, as by `apply.patched`; an fp8 weight
    with a scale gets a new scale. Only the requested tensor takes memory.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.changed = 0  # parameters of the network
        self._values: dict[str, Callable[[], Tensor]] = {}
        self._mapped = mapped_files()
        self._read: list[Tensor] = []  # from the file for the last value

    def value(self, name: str) -> Tensor:
        """The values of one of `tensors`; frees those of the previous one."""
        forget_pages(self._read, self._mapped)
        self._read = []
        return self._values[name]()

    def add(self, name: str, tensor: Tensor) -> None:
        """Adds a tensor unchanged."""
        self._put(name, tensor, lambda: tensor, tensor)

    def add_network(
        self,
        tensors: Mapping[str, Tensor],
        layout: Layout,
        patches: Sequence[Patch],
        name_of: Callable[[str], str] | None = None,
        eight_bit: EightBit | None = None,
    ) -> list[str]:
        """Adds a network of a file with patches applied; returns the names of the file that are not the network's.

        name_of    gives the new file's name for a published name; None: names stay as in the old file
        eight_bit  which weights become 8-bit, with scales in ComfyUI's layout
        Raises CascadeError for a patch of a parameter that the network does not have, or has in another shape.
        """
        changes = changes_by_target(patches)
        targets = {parameter_name(target): target for target in changes}
        eight_bit = eight_bit or EightBit(None)
        own_names = [name for name in tensors if layout.published_name(name) is not None]
        scales = {scale for name in own_names if (scale := scale_name(name, tensors)) is not None}
        scales |= eight_bit.stale(tensors, layout)
        others = []

        def renamed(name: str) -> str:
            published = layout.published_name(name)
            return name_of(published) if name_of and published else name

        for name, tensor in tensors.items():
            if name in scales:
                continue  # is added together with its weight
            published = layout.published_name(name)
            if published is None:
                others.append(name)
                continue
            turned = published in layout.transposed and tensor.ndim == 2
            if turned and name_of:  # the new names stand for matrices that are not transposed
                tensor, turned = tensor.T, False
            parts = split_attention({published: tensor.T if turned else tensor})  # or three, of a fused one
            steps: list[Steps] = []
            for part, row in parts.items():
                target = targets.pop(part, None)
                steps.append([] if target is None else changes[target])
                check_shape(row.shape, target or part, steps[-1])
            self.changed += sum(map(bool, steps))
            if len(parts) > 1 and (eight_bit.dtype or name_of):
                before, _, leaf = name.rpartition(FUSED)
                for third, (part, row), own in zip(THIRDS, parts.items(), steps, strict=True):
                    split = _Weight(renamed(f"{before}{third}.{leaf}"), row, False, [own])
                    self._add_weight(split, eight_bit.of(row, part))
                continue
            weight = _Weight(renamed(name), tensor, turned, steps)
            scale, dtype = scale_name(name, tensors), eight_bit.of(tensor, published)
            if scale is None or dtype is not None:
                self._add_weight(weight, dtype, None if scale is None else tensors[scale])
            else:
                self._add_scaled(weight, renamed(scale), tensors[scale])
        if targets:
            target = next(iter(targets.values()))
            raise CascadeError(
                f"{changes[target][0][0].name} changes {printable(target)}, which this network does not have; choose "
                "the LoRA that was trained for it."
            )
        return others

    def _add_weight(
        self, weight: _Weight, eight_bit: torch.dtype | None, scale: Tensor | None = None
    ) -> None:
        stored = weight.stored
        if eight_bit is not None:
            self._add_eight_bit(weight, eight_bit, scale)
        elif any(weight.steps):
            self._put(weight.name, stored, lambda: weight.values().to(stored.dtype), stored)
        else:
            self.add(weight.name, stored)

    def _add_eight_bit(self, weight: _Weight, dtype: torch.dtype, scale: Tensor | None) -> None:
        """Adds a weight in 8 bits with its scale and format.  scale: that of the file's own weight"""
        stored, small = weight.stored, {}

        def value(name: str) -> Tensor:
            if name in small:
                return small[name]
            floats = stored if scale is None else rescaled("The file", weight.name, stored, scale)
            made = written_layout(weight.name, replace(weight, stored=floats).values().float(), dtype)
            small.update({part: tensor for part, tensor in made.items() if part != weight.name})
            return made[name]

        for name, like in written_layout(weight.name, stored.to("meta").float(), dtype).items():
            self._put(name, like, partial(value, name), stored)

    def _add_scaled(self, weight: _Weight, scale_name: str, scale: Tensor) -> None:
        """Adds an fp8 weight with its scale, which is computed anew if the weight was changed."""
        if not any(weight.steps):
            self.add(weight.name, weight.stored)
            self.add(scale_name, scale)
            return
        stored = weight.stored

        def pair() -> tuple[Tensor, Tensor]:
            values = replace(weight, stored=rescaled("The file", weight.name, stored, scale)).values()
            return requantised(values, stored.dtype, scale)

        self._put(weight.name, stored, lambda: pair()[0], stored)
        self._put(scale_name, scale, lambda: pair()[1], stored)

    def _put(self, name: str, like: Tensor, value: Callable[[], Tensor], source: Tensor) -> None:
        def read() -> Tensor:
            self._read = [source]
            return value()

        self.tensors[name] = torch.empty(like.shape, dtype=like.dtype, device="meta")
        self._values[name] = read
