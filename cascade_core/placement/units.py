"""A network cut into units: neighbouring blocks whose weights move together, as one run of bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..networks.unet import UNet

# Blocks are joined up to this: in Stage C 3.6 B a ResBlock with its TimestepBlock (65.5 MiB) and, alone, an AttnBlock
# (40 MiB), of which two make the smallest slots that stream enough for a card of 5 GB.
UNIT_BYTES = 66 << 20
ALIGNMENT = 256  # bytes, CUDA's own for what it allocates


@dataclass(frozen=True)
class Part:
    """One tensor's place in its unit's bytes."""

    start: int
    size: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def view(self, memory: Tensor) -> Tensor:
        piece = memory[self.start : self.start + self.size].view(self.dtype)
        return piece.as_strided(self.shape, self.stride)


class Unit:
    """Blocks that run one after the other, with their parameters and buffers.

    tensors  the parameters and buffers themselves; a patched weight's stand-in takes its place here and in its layer
    home     where each lies in main memory: views of the file, the loader's own, or of `host`
    host     all of them in pinned memory, once that has paid
    slab     all of them on the device, where they stay there between runs
    patches  the patches that the weights in `slab` have, as they were given
    """

    def __init__(self, blocks: Sequence[nn.Module], tensors: Sequence[Tensor]):
        self.blocks = list(blocks)
        self.tensors = list(tensors)
        self.home = [tensor.detach() for tensor in tensors]
        self.parts: list[Part] = []
        end = 0
        for tensor in self.home:
            end = -(-end // ALIGNMENT) * ALIGNMENT
            stride = (
                tensor.stride() if is_dense(tensor) else torch.empty(tensor.shape, device="meta").stride()
            )
            self.parts.append(Part(end, tensor.nbytes, tuple(tensor.shape), tuple(stride), tensor.dtype))
            end += tensor.nbytes
        self.size = max(-(-end // ALIGNMENT) * ALIGNMENT, ALIGNMENT)
        self.host: Tensor | None = None
        self.slab: Tensor | None = None
        self.fetched = False  # at least once
        self.patches: tuple = ()
        self.originals: dict[
            int, tuple[nn.Module, Tensor]
        ] = {}  # place -> the layer, and the weight stood in for

    def views(self, memory: Tensor) -> list[Tensor]:
        """Each tensor, in the unit's bytes at `memory`."""
        with torch.inference_mode():
            return [part.view(memory) for part in self.parts]

    def point(self, places: Iterable[Tensor]) -> None:
        """The tensors lie there from now on."""
        for tensor, place in zip(self.tensors, places, strict=True):
            tensor.data = place

    def read(self, into: Tensor, start: int = 0) -> None:
        """Fills `into` with the unit's bytes from `start` on."""
        end = start + len(into)
        for part, tensor in zip(self.parts, self.home, strict=True):
            first, last = max(part.start, start), min(part.start + part.size, end)
            if first < last:
                flat = bytes_of(tensor)
                into[first - start : last - start].copy_(flat[first - part.start : last - part.start])

    def stand_in(self, place: int, layer: nn.Module) -> None:
        """A new parameter for the layer's weight, so that who remembers the old one sees that it is another."""
        if place in self.originals:
            return
        original = self.tensors[place]
        self.originals[place] = layer, original
        self.tensors[place] = nn.Parameter(original.detach(), requires_grad=False)
        layer.weight = self.tensors[place]

    def put_back(self) -> None:
        """The layers have their own parameters again. Their values are whatever lies where they point."""
        for place, (layer, original) in self.originals.items():
            original.data = self.tensors[place].data
            self.tensors[place] = original
            layer.weight = original
        self.originals.clear()

    def leave(self) -> None:
        """Off the device: all tensors are the ones in main memory, as they were."""
        self.put_back()
        self.point(self.home)
        self.slab, self.patches = None, ()


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's values fill its memory without gaps and without overlaps, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def bytes_of(tensor: Tensor) -> Tensor:
    """A tensor's values as bytes, in the order in which they lie in memory; a view where they are dense."""
    if not is_dense(tensor):
        tensor = tensor.contiguous()
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def cut(network: nn.Module, unit_bytes: int = UNIT_BYTES) -> tuple[list[Unit], list[Unit]]:
    """(units, order): a network's units, the first of what always stays; and the others as a forward runs them.

    What lies in no block stays, and all vectors: they are a thousandth of the weights, and most of the tensors. A unit
    whose level repeats is several times in the order.
    """
    units: list[Unit] = []
    order: list[Unit] = []
    taken: set[int] = set()
    for blocks, repeats in levels(network):
        level = [Unit(joined, _tensors(joined, taken, least=2)) for joined in _joined(blocks, unit_bytes)]
        units += level
        order += level * repeats
    return [Unit([], _tensors([network], taken)), *units], order


def levels(network: nn.Module) -> list[tuple[list[nn.Module], int]]:
    """Runs of blocks, each with how often it is run through, in the order of a forward. Empty: cannot be streamed."""
    if isinstance(network, UNet):
        both = [
            (network.down_blocks, network.down_repeat_mappers),
            (network.up_blocks, network.up_repeat_mappers),
        ]
        return [
            (list(blocks), len(mappers) + 1)  # type: ignore[arg-type]
            for direction in both
            for blocks, mappers in zip(*direction, strict=True)
        ]
    for part in ("text_model", "vision_model"):  # CLIP's
        encoder = getattr(getattr(network, part, None), "encoder", None)
        if encoder is not None:
            return [(list(encoder.layers), 1)]
    return []


def _joined(blocks: Sequence[nn.Module], most: int) -> list[list[nn.Module]]:
    """Neighbours together, while they are not larger than `most`."""
    joined: list[list[nn.Module]] = []
    size = 0
    for block in blocks:
        own = sum(tensor.nbytes for tensor in (*block.parameters(), *block.buffers()))
        if joined and size + own <= most:
            joined[-1].append(block)
            size += own
        else:
            joined.append([block])
            size = own
    return joined


def _tensors(modules: Iterable[nn.Module], taken: set[int], least: int = 0) -> list[Tensor]:
    """The parameters and buffers that no unit has yet, of at least so many dimensions longer than 1.

    Vectors come last: so the matrices of query, key and value, which the engine multiplies with at once, lie side by
    side.
    """
    found = []
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) not in taken and _dimensions(tensor) >= least:
                taken.add(id(tensor))
                found.append(tensor)
    return sorted(found, key=lambda tensor: _dimensions(tensor) < 2)


def _dimensions(tensor: Tensor) -> int:
    return sum(size > 1 for size in tensor.shape)
