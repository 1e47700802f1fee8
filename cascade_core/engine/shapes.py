"""Cache for forwards of one shape: the run's constant values and the CUDA graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..networks.fp16 import divide_
from ..networks.stage_b import StageB
from ..networks.stage_c import StageC
from ..networks.unet import UNet
from ..placement import RunBytes
from .graphs import Graphed, GraphMemory
from .layout import as_tokens
from .operations import Operations
from .state import RunCache
from .unet import BoundUNet

Conditions = Mapping[str, Tensor | None]
Versioned = tuple[Tensor | None, int]  # a tensor with its version, which counts writes to it


class ShapeCache:
    """Constant values of a run and the CUDA graph of a forward, for one shape of x and all conditions."""

    def __init__(self, network: UNet, memory: GraphMemory, graphs: bool):
        self.network = network
        self._compiled = False
        self._graphed = Graphed(memory) if graphs else None
        self._complete_bytes = 0
        self.clear(memory)

    def clear(self, memory: GraphMemory) -> None:
        """Drops everything but the compiled kernels and what a graph needs. Graphs use this memory from now on."""
        if self._graphed is not None:
            self._graphed.move_to(memory)
        self._cache: RunCache | None = None
        self._conditions: dict[str, Versioned] | None = None  # of the cache; None: it is incomplete
        self._control: list[Versioned] = []

    def prepare(
        self, bound: BoundUNet, x: Tensor, conditions: Conditions, control: Sequence[Tensor | None]
    ) -> RunCache:
        """The cache of a forward with these conditions, except its table.

        Unless the conditions are those of the last call, its keys and values still have to be computed from
        `cond_tokens`.
        """
        cache = self._cache
        if cache is None or self._conditions is None or not _same_values(conditions, self._conditions):
            self._conditions = None
            tokens, added = _embed_conditions(self.network, x, conditions)
            if cache is None:
                cache = self._cache = _empty_cache(bound, x, added, control)
            else:
                _copy([cache.conditions], [added])
            cache.cond_tokens = F.silu(tokens)
        if len(control) != len(self._control) or not all(map(_is_unchanged, control, self._control)):
            _copy(cache.control, control)
            for residual in cache.control:
                if residual is not None:
                    divide_(residual, bound.scale)
            self._control = [_versioned(residual) for residual in control]
        return cache

    def forget(self, memory: GraphMemory) -> None:
        """Drops what a graph needs too: forwards may be other ones."""
        if self._graphed is not None:
            self._graphed = Graphed(memory)
        self.clear(memory)

    def cache_bytes(self, device: torch.device) -> int:
        """Bytes of the constant values on the device."""
        if self._cache is None:
            return 0
        values = (*self._cache.keys, *self._cache.values, self._cache.conditions, *self._cache.control)
        return sum(value.nbytes for value in values if value is not None and value.device == device)

    @property
    def known_bytes(self) -> RunBytes | None:
        """What a run of this shape takes; None where there was no whole one yet that ended in a graph."""
        workspace = None if self._graphed is None else self._graphed.workspace_bytes
        return None if workspace is None else RunBytes(workspace, self._complete_bytes)

    def complete(self, conditions: Conditions) -> None:
        """Marks the cache as complete: a forward with these conditions has been run."""
        assert self._cache is not None
        self._cache.noise_embedding = self._cache.cond_tokens = None
        self._complete_bytes = self.cache_bytes(self._cache.table.device)
        self._conditions = {name: _versioned(value) for name, value in conditions.items()}

    def run(self, bound: BoundUNet, ops: Operations, x: Tensor, cache: RunCache) -> Tensor:
        def forward(x: Tensor) -> Tensor:
            return bound.run(ops, x, cache)

        if not self._compiled:
            ops.compile_ahead(lambda: forward(x))
            self._compiled = True
        return forward(x) if self._graphed is None else self._graphed(forward, x)


def _empty_cache(
    bound: BoundUNet, x: Tensor, conditions: Tensor | None, control: Sequence[Tensor | None]
) -> RunCache:
    table = x.new_empty(bound.table_size, dtype=torch.float32)
    keys, values, peaks = ([None] * bound.attentions for _ in range(3))
    residuals = [_channels_last_like(residual) for residual in control]
    return RunCache(table, keys, values, conditions, residuals, peaks=peaks)


def _channels_last_like(residual: Tensor | None) -> Tensor | None:
    return None if residual is None else torch.empty_like(residual, memory_format=torch.channels_last)


def _embed_conditions(network: Any, x: Tensor, conditions: Any) -> tuple[Tensor, Tensor | None]:
    """Conditioning tokens (B, T, C_cond), and (B, N, C) to add to the embedded x, or None."""
    if isinstance(network, StageC):
        return network.embed_conditions(**conditions), None
    return _embed_stage_b(network, x, **conditions)


def _embed_stage_b(
    network: StageB, x: Tensor, clip: Tensor, effnet: Tensor, pixels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    from_effnet, from_pixels = network.map_conditions(x, effnet, pixels)
    return network.embed_conditions(clip), as_tokens(from_effnet + from_pixels)


def _versioned(value: Tensor | None) -> Versioned:
    """A tensor with its version; tensors made in inference mode have none."""
    return value, 0 if value is None or value.is_inference() else value._version


def _is_unchanged(value: Tensor | None, before: Versioned) -> bool:
    """Whether it is the same tensor as before, not written to since."""
    return value is before[0] and _versioned(value)[1] == before[1]


def _same_values(conditions: Conditions, before: dict[str, Versioned]) -> bool:
    """Whether the tensors are the same, or equal: a host may concatenate its prompts anew at each step."""
    for name, value in conditions.items():
        versioned = before.get(name, (None, 0))
        if _is_unchanged(value, versioned):
            continue
        old = versioned[0]
        if value is old or value is None or old is None or not torch.equal(value, old):
            return False
    return True


def _copy(targets: Sequence[Tensor | None], sources: Sequence[Tensor | None]) -> None:
    for target, source in zip(targets, sources, strict=True):
        if target is not None and source is not None:
            target.copy_(source)
