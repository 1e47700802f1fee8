"""Drop-in replacement for a network that caches everything constant across sampling steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..networks.fp16 import stream_scale
from ..networks.layers import AttnBlock
from ..networks.precision import compute_dtype
from ..networks.quantisation import E4M3, INT8, quantised_layers, weight_format
from ..networks.stage_c import StageC
from ..networks.unet import UNet
from ..placement import RunBytes, WeightConsumer, largest_run
from ..placement.stream import WeightStream
from . import compilation
from .backend import WAYS, Precision, Way, operations_on
from .fallback import Fallback, Notify
from .graphs import GraphMemory
from .lru import LRU
from .operations import Operations
from .shapes import Conditions, ShapeCache
from .unet import BoundUNet
from .weights import OwnModules, WeightSnapshot

SHAPES = 4  # cached input shapes, on CUDA with their graphs
TABLES = 64  # noise conditions whose scales and shifts are cached: 1 MB each for Stage C 3.6 B


class Engine(WeightConsumer):
    """`engine(x, r, **conditions)` as `network(x, r, **conditions)`, for StageB and StageC in evaluation.

    Made once per network. It follows the network where its weights are changed or moved; where placement streams them,
    it runs each block while its weights are available, without graphs. Where a kernel fails, it goes on without
    kernels (fallback.py). It calls the network itself for convolutions other than 3 × 3, for noise conditions that
    differ within the batch, for modules that a host replaced, and for weights on another device than x, in another
    dtype, or changed by hooks while they are used.
    """

    def __init__(
        self,
        network: UNet,
        join: bool = False,
        notify: Notify | None = None,
    ):
        """join: on CUDA, move weights that are read together next to each other in memory.

        notify: told once, in a sentence, that kernels failed and what that costs; by default the log.
        """
        self.network, self.join = network, join
        self.graphs = True  # whether forwards of a new shape may be captured
        self.precision: Precision = precision_of(network)
        self.config = network.config
        self._fallback = Fallback(
            "Stage C" if isinstance(network, StageC) else "Stage B", WAYS[self.precision], notify
        )
        self._compilation: compilation.Compilation | None = None
        self._bound: BoundUNet | None = None
        self._bound_way: Way = self.precision
        self._weights = WeightSnapshot(network)
        self._modules = OwnModules(network)
        self._tables: LRU[Tensor] = LRU(TABLES)
        self._shapes: LRU[ShapeCache] = LRU(SHAPES)
        self._graph_memory = GraphMemory()
        self.replaced: str | None = None  # a module that was not the network's own at the last call
        self._patched = 0  # version of the placement that the cached values were derived from

    def parameters(self) -> Any:
        return self.network.parameters()

    def compile_in_background(self, device: torch.device) -> None:
        """Begins to compile the kernels of forwards on a device, before the first one runs."""
        self._compilation = compilation.begin(self.network, device, self.precision)

    def extra_bytes(self, tokens: int = 0) -> int:
        """Estimate of the bytes that the engine takes beside the weights and a forward's workspace: keys and values
        of `tokens` conditioning tokens, of all images together, and the largest 8-bit weight dequantised.
        """
        largest = max((layer.weight.numel() for _, layer in quantised_layers(self.network)), default=0)
        widths = sum(block.norm.normalized_shape[0] * repeats for block, repeats in self._attention_blocks())
        return (largest + 2 * tokens * widths) * compute_dtype(self.network).itemsize

    def _attention_blocks(self) -> Iterator[tuple[Any, int]]:
        """Each AttnBlock with the number of times that it runs in a forward."""
        for blocks, repeats in self.network.levels():
            yield from ((block, repeats) for block in blocks if isinstance(block, AttnBlock))

    @torch.inference_mode()
    def __call__(
        self,
        x: Tensor,
        r: Tensor,
        *,
        sca: Tensor | None = None,
        crp: Tensor | None = None,
        control: Sequence[Tensor | None] | None = None,
        **conditions: Tensor | None,
    ) -> Tensor:
        extra = {name: value for name, value in (("sca", sca), ("crp", crp)) if value is not None}
        noise = _scalars({"r": r, **extra})
        stream = self._follow_weights()
        self.replaced = self._modules.replaced()
        readable = self.replaced is None and self._weights.readable(x, stream)
        if noise is None or self.config.kernel_size != 3 or not readable:
            extra = {**extra, **({} if control is None else {"control": control})}
            return self.network(x, r.to(x.device), **conditions, **extra)
        return self._fallback.run(
            lambda way: self._forward(way, x, noise, conditions, control or (), stream), x.device
        )

    def _forward(
        self,
        way: Way,
        x: Tensor,
        noise: dict[str, float],
        conditions: Conditions,
        control: Sequence[Tensor | None],
        stream: WeightStream | None,
    ) -> Tensor:
        self._graph_memory.shared = None if self.placement is None else self.placement.shared
        ops, bound = self._bind(x, way)
        if self._compilation is not None:
            self._compilation.finish()
            self._compilation = None
        shape = self._shape_cache(ops, x, conditions, control)
        cache = shape.prepare(bound, x, conditions, control)
        key = tuple(sorted(noise.items()))
        table = self._tables.get(key)
        if table is None:
            others = {name: value for name, value in noise.items() if name != "r"}
            cache.noise_embedding = bound.embed_noise(noise["r"], others)
        else:
            cache.noise_embedding = None
            cache.table.copy_(table)
        if stream is None:
            bound.prepare(cache)
            out = shape.run(bound, ops, x, cache)
        else:
            out = bound.run_streamed(ops, x, cache, stream)
        # Only after the forward, so that an interrupted one leaves no incomplete entry.
        self._tables.get_or_create(key, cache.table.clone)
        shape.complete(conditions)
        return out

    def forget(self) -> None:
        """Frees everything derived from the weights, with the graphs' memory."""
        self._bound = None
        self._tables.clear()
        self._graph_memory = GraphMemory()
        for shape in self._shapes.values():
            shape.forget(self._graph_memory)

    def offload(self) -> None:
        """Frees what becomes invalid, or is not worth its memory, when the weights leave the device.

        Small values that depend only on the weights' values are kept: they stay valid when the weights come back.
        """
        self._graph_memory = GraphMemory()
        for shape in self._shapes.values():
            shape.clear(self._graph_memory)

    def graph_bytes(self, device: torch.device) -> int:
        """Bytes on the device that the CUDA graphs keep for their intermediate values, if they are not shared."""
        return self._graph_memory.size(device)

    def cache_bytes(self, device: torch.device) -> int:
        """Bytes on the device of what is constant in runs."""
        return sum(shape.cache_bytes(device) for shape in self._shapes.values())

    def shared_workspace(self) -> Tensor | None:
        return self._graph_memory.memory if self._graph_memory.is_shared else None

    def known_bytes(self, shape: Sequence[int]) -> RunBytes | None:
        """What runs on x of this shape are known to take; None where none of them has ended in a CUDA graph."""
        way = self._bound_way, tuple(shape)
        return largest_run(
            [
                each.known_bytes
                for key, each in self._shapes.items()
                if isinstance(key, tuple) and key[:2] == way
            ]
        )

    def _follow_weights(self) -> WeightStream | None:
        """Invalidates stale caches. Returns the weight stream, or None if the weights are resident."""
        placement = self.placement
        if placement is None:
            stream, version, same = None, 0, self._weights.unchanged()
        else:
            stream, version, same = placement.stream, placement.version, self._weights.same_values()
        if not same or version != self._patched:
            self.forget()
            self._weights, self._patched = WeightSnapshot(self.network), version
        elif placement is not None and stream is None and self._weights.moved():
            self.offload()
        return stream

    def _bind(self, x: Tensor, way: Way) -> tuple[Operations, BoundUNet]:
        """The operations, and the network bound for them."""
        ops = operations_on(x.device, way)
        scale = stream_scale(self.network)  # of the residual stream, which a host may change
        if self._bound is None or (self._bound_way, self._bound.scale) != (way, scale):
            self.forget()
            join = self.join and x.is_cuda and self.placement is None  # a placement has joined them already
            self._bound, self._bound_way = BoundUNet(self.network, join, ops.formats), way
            self._weights = WeightSnapshot(self.network)  # joining moves some
        return ops, self._bound

    def _shape_cache(
        self, ops: Operations, x: Tensor, conditions: Conditions, control: Sequence[Tensor | None]
    ) -> ShapeCache:
        key = (
            self._bound_way,
            tuple(x.shape),
            x.dtype,
            x.device,
            tuple((name, None if t is None else tuple(t.shape)) for name, t in sorted(conditions.items())),
            tuple(None if residual is None else tuple(residual.shape) for residual in control),
        )
        graphs = self.graphs and ops.can_capture(x.device)
        return self._shapes.get_or_create(key, lambda: ShapeCache(self.network, self._graph_memory, graphs))


def precision_of(network: UNet) -> Precision:
    """The precision of the products in a network's blocks; "exact" is that of its weights."""
    names: dict[torch.dtype | None, Precision] = {E4M3: "fp8", INT8: "int8"}
    return names.get(weight_format(network), "exact")


def _scalars(values: dict[str, Tensor]) -> dict[str, float] | None:
    """Each tensor (B,) as the one number that it repeats, or None where one holds different numbers."""
    scalars = {}
    for name, value in values.items():
        scalars[name], *others = value.tolist()
        if any(other != scalars[name] for other in others):
            return None
    return scalars
