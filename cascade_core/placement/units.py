"""Splits a network into units: neighbouring blocks whose weights are copied together, as one run of bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..networks.precision import cast_dtype, dtype_on_device
from ..networks.quantisation import quantised_layers
from ..networks.unet import UNet

# Blocks are joined up to this size: in Stage C 3.6 B, a ResBlock with its TimestepBlock (65.5 MiB), and an AttnBlock
# by itself (40 MiB). Two slots of the latter's size are the smallest that stream enough for a card of 5 GB.
UNIT_BYTES = 66 << 20
TABLE_BYTES = 32 << 20  # from this size on, embeddings are a unit of their own: a forward reads few rows
ALIGNMENT = 256  # bytes, as CUDA aligns its allocations


@dataclass(frozen=True)
class TensorLayout:
    """Position of one tensor in its unit's bytes. start, size: in bytes; stride: in elements; dtype: on the device."""

    start: int
    size: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def view(self, memory: Tensor) -> Tensor:
        """The tensor in `memory`, the unit's bytes (uint8)."""
        tensor_bytes = memory[self.start : self.start + self.size].view(self.dtype)
        return tensor_bytes.as_strided(self.shape, self.stride)

    def alone(self, memory: Tensor) -> Tensor:
        """The tensor in `memory` (uint8) that holds it alone."""
        return memory.view(self.dtype).as_strided(self.shape, self.stride)


class Unit:
    """Consecutive blocks with their parameters and buffers, in `dtype` on the device (None: the stored one).

    tensors        the parameters and buffers
    host_tensors   each of them in main memory: views of the file, the loader's tensors, or views of `pinned`
    pinned         all of them in pinned memory in the device's layout, once that pays off
    changed        bytes, by index, of tensors with their patches, to be copied in place of those in `pinned`
    device_buffer  all of them on the device, while the unit is resident there
    reserved_buffer  kept for it on the device: it comes back to the same addresses, which CUDA graphs need. Another
                   network's unit may be there meanwhile. None: it comes to any memory
    evicted        whether it had to leave for another network, the last time that its memory was freed
    patch_key      identifies the patches of the weights in `device_buffer`
    """

    def __init__(
        self, blocks: Sequence[nn.Module], tensors: Sequence[Tensor], dtype: torch.dtype | None = None
    ):
        self.blocks = list(blocks)
        self.tensors = list(tensors)
        self.host_tensors = [tensor.detach() for tensor in tensors]
        self.layouts: list[TensorLayout] = []
        end = 0
        for tensor in self.host_tensors:
            end = -(-end // ALIGNMENT) * ALIGNMENT
            stride = (
                tensor.stride() if is_dense(tensor) else torch.empty(tensor.shape, device="meta").stride()
            )
            on_device = dtype_on_device(tensor.dtype, dtype)
            size = tensor.numel() * on_device.itemsize
            self.layouts.append(TensorLayout(end, size, tuple(tensor.shape), tuple(stride), on_device))
            end += size
        self.size = max(-(-end // ALIGNMENT) * ALIGNMENT, ALIGNMENT)  # bytes
        self.pinned: Tensor | None = None
        self.changed: dict[int, Tensor] = {}
        self.device_buffer: Tensor | None = None
        self.reserved_buffer: Tensor | None = None
        self.evicted = False
        self.fetched = False  # whether it was, at least once
        self.patch_key: Any = None

    def views(self, memory: Tensor) -> list[Tensor]:
        """Each tensor, in the unit's bytes at `memory`."""
        with torch.inference_mode():
            return [layout.view(memory) for layout in self.layouts]

    def point_to(self, values: Iterable[Tensor]) -> None:
        """Makes each tensor share the memory of its values."""
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.data = value

    def read_bytes(self, target: Tensor, start: int = 0) -> None:
        """Fills `target` with the unit's bytes from `start` on, cast to the dtypes that they have on the device.

        start and the end of target must lie between whole values, as multiples of ALIGNMENT do.
        """
        end = start + len(target)
        for layout, tensor in zip(self.layouts, self.host_tensors, strict=True):
            first, last = max(layout.start, start), min(layout.start + layout.size, end)
            if first < last:
                size, begin = layout.dtype.itemsize, layout.start
                values = values_of(tensor)[(first - begin) // size : (last - begin) // size]
                target[first - start : last - start].view(layout.dtype).copy_(values)

    def pieces(self, pinned: Tensor, changed: Mapping[int, Tensor]) -> Iterator[tuple[int, Tensor]]:
        """(start, bytes) of the whole unit: its `changed` tensors, and the bytes between them in `pinned`."""
        start = 0
        for index, values in sorted(changed.items()):  # in the order of their positions
            layout = self.layouts[index]
            if layout.start > start:
                yield start, pinned[start : layout.start]
            yield layout.start, values
            start = layout.start + layout.size
        if start < len(pinned):
            yield start, pinned[start:]

    @contextmanager
    def looked_up_on_host(self, device: torch.device) -> Iterator[None]:
        """Inside the block a table of embeddings that is in main memory gives its rows on the device."""
        (table,), dtype = self.blocks, self.layouts[0].dtype
        hooks = [
            table.register_forward_pre_hook(lambda _, inputs: tuple(ids.cpu() for ids in inputs)),
            table.register_forward_hook(lambda _, inputs, rows: rows.to(device, dtype)),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def offload(self) -> None:
        """Takes the unit off the device; its tensors then are those in main memory, unpatched."""
        self.point_to(self.host_tensors)
        self.device_buffer, self.patch_key = None, None


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's values fill its memory without gaps or overlaps, in any order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def values_of(tensor: Tensor) -> Tensor:
    """A tensor's values in one dimension, in memory order; a view where they are dense."""
    if not is_dense(tensor):
        tensor = tensor.contiguous()
    return tensor.as_strided((tensor.numel(),), (1,))


def split_into_units(network: nn.Module, unit_bytes: int = UNIT_BYTES) -> tuple[list[Unit], list[Unit]]:
    """(units, order): a network's units, of which the first is always resident; `order` as a forward runs them.

    unit_bytes: maximum of a unit on the device, unless a single block has more.

    Always resident are the weights outside the blocks and all vectors: a thousandth of the bytes, and most of the
    tensors. A unit whose level repeats stands several times in the order. Large tables of embeddings are units too, in
    no order: `tables_of` finds them.
    """
    units: list[Unit] = []
    order: list[Unit] = []
    assigned: set[int] = set()
    dtype = cast_dtype(network)
    for module in network.modules():
        if isinstance(module, nn.Embedding) and module.weight.nbytes >= TABLE_BYTES:
            units.append(Unit([module], _unassigned_tensors([module], assigned), dtype))
    for blocks, repeats in _levels(network):
        level = [
            Unit(group, _unassigned_tensors(group, assigned, min_dimensions=2), dtype)
            for group in _group_blocks(blocks, unit_bytes, dtype)
        ]
        units += level
        order += level * repeats
    return [Unit([], _unassigned_tensors([network], assigned), dtype), *units], order


def tables_of(units: Iterable[Unit]) -> list[Unit]:
    """The units that are a table of embeddings."""
    return [unit for unit in units if len(unit.blocks) == 1 and isinstance(unit.blocks[0], nn.Embedding)]


def _levels(network: nn.Module) -> list[tuple[list[nn.Module], int]]:
    """Lists of blocks in the order of a forward, each with how often it runs. Empty: the network cannot be streamed."""
    if isinstance(network, UNet):
        return network.levels()
    for name in ("text_model", "vision_model"):  # CLIP's
        encoder = getattr(getattr(network, name, None), "encoder", None)
        if encoder is not None:
            return [(list(encoder.layers), 1)]
    return []


def _group_blocks(
    blocks: Sequence[nn.Module], max_bytes: int, dtype: torch.dtype | None
) -> list[list[nn.Module]]:
    """Neighbouring blocks joined up to `max_bytes`; a larger block stands alone."""
    groups: list[list[nn.Module]] = []
    group_bytes = 0
    for block in blocks:
        block_bytes = sum(
            tensor.numel() * dtype_on_device(tensor.dtype, dtype).itemsize
            for tensor in (*block.parameters(), *block.buffers())
        )
        if groups and group_bytes + block_bytes <= max_bytes:
            groups[-1].append(block)
            group_bytes += block_bytes
        else:
            groups.append([block])
            group_bytes = block_bytes
    return groups


def _unassigned_tensors(
    modules: Iterable[nn.Module], assigned: set[int], min_dimensions: int = 0
) -> list[Tensor]:
    """The parameters and buffers not yet in a unit, with at least `min_dimensions` dimensions longer than 1.

    The scales of 8-bit weights follow them. Vectors come last, so that the matrices of query, key and value, which
    the engine multiplies in one product, are adjacent.
    """
    tensors = []
    for module in modules:
        scales = {id(layer.weight_scale) for _, layer in quantised_layers(module)}
        for tensor in (*module.parameters(), *module.buffers()):
            large = _dimensions(tensor) >= min_dimensions or id(tensor) in scales
            if id(tensor) not in assigned and large:
                assigned.add(id(tensor))
                tensors.append(tensor)
    return sorted(tensors, key=lambda tensor: _dimensions(tensor) < 2)


def _dimensions(tensor: Tensor) -> int:
    """Number of dimensions longer than 1."""
    return sum(size > 1 for size in tensor.shape)
