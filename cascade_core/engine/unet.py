"""Stage B and Stage C bound for speed: the same weights, walked as a flat program over tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..networks.layers import AttnBlock, TimestepBlock, resize
from ..networks.unet import UNet
from .blocks import BoundAttention, BoundMLP, BoundTimestep, Make, Missing, Operand, join_


@dataclass
class Given:
    """What a forward needs beside x, in the network's dtype on its device.

    table       (Σ 2C,) float32: scale and shift of every TimestepBlock
    keys        one (B, T, C) for each attention block, as `values`; None until they are made
    conditions  (B, N, C) that is added to the embedded x, or None (Stage C has none)
    control     a residual (B, C, h, w) or None for each ResBlock
    """

    table: Tensor
    keys: list[Any]
    values: list[Any]
    conditions: Tensor | None = None
    control: Sequence[Tensor | None] = ()


@dataclass
class Walk:
    """Where a forward is."""

    x: Tensor
    size: tuple[int, int]
    given: Given
    ops: Any
    skips: list[tuple[Tensor, tuple[int, int]]] = field(default_factory=list)
    blocks: int = 0  # residual blocks so far: which control comes next


Step = Callable[[Walk], None]


class Part(NamedTuple):
    """Steps that read the weights of one block, or of none that is ever streamed. `bound`: that block."""

    steps: list[Step]
    bound: BoundMLP | BoundTimestep | BoundAttention | None = None


class Arrivals(Protocol):
    """Blocks whose weights are there from `pre_forward` to `post_forward` alone, as in placement/stream.py."""

    def pre_forward(self, block: nn.Module) -> None: ...

    def post_forward(self, block: nn.Module) -> None: ...


class BoundUNet:
    """A network's program. What was derived from weights holds for as long as they have the same values."""

    def __init__(self, network: UNet, join: bool = False, operand: Make | None = None):
        """`join`: lay the attention's input weights side by side, which moves them (to where they are read faster).

        operand: of the operations with which it will be called, where they multiply by something else than the
        weights.
        """
        self.network: Any = network  # its modules are attributes of any type
        self.attentions = self.table_size = 0
        if join:
            for module in network.modules():
                if isinstance(module, AttnBlock):
                    join_(module)
        self._make = None if operand is None else _once(operand)
        self.program = self._compile()

    # What is computed once per run

    def embedding(self, r: float, extra: dict[str, float]) -> Tensor:
        """Of one noise condition, that TimestepBlocks read.  -> (1, R · (1 + conds))"""
        weight = self.network.embedding[1].weight
        values = {name: torch.tensor([value], device=weight.device) for name, value in extra.items()}
        return self.network.embed_timesteps(torch.tensor([r], device=weight.device), values).to(weight.dtype)

    def prepare(self, missing: Missing) -> None:
        """All that is missing, where all weights are there."""
        for part in self.program:
            if part.bound is not None:
                part.bound.prepare(missing)

    # A forward

    def __call__(self, ops: Any, x: Tensor, given: Given) -> Tensor:
        """x: (B, c_in, H, W) -> the noise in it, (B, c_out, H, W); all was prepared"""
        walk = self._enter(ops, x, given)
        for part in self.program:
            for step in part.steps:
                step(walk)
        return self._leave(walk)

    def streamed(self, ops: Any, x: Tensor, given: Given, arrivals: Arrivals, missing: Missing) -> Tensor:
        """The same, with blocks whose weights come and go. What is missing is made of each as it is there."""
        walk = self._enter(ops, x, given)
        for steps, bound in self.program:
            if bound is not None:
                arrivals.pre_forward(bound.block)
                bound.prepare(missing)
            for step in steps:
                step(walk)
            if bound is not None:
                arrivals.post_forward(bound.block)
        return self._leave(walk)

    def _enter(self, ops: Any, x: Tensor, given: Given) -> Walk:
        h = self.network.embedding[0](x)  # pixels to channels
        size = (h.shape[-2], h.shape[-1])
        embed, eps = self.network.embedding[1], self.network.embedding[2].eps
        tokens = ops.norm(ops.linear(as_tokens(h), embed.weight.flatten(1), embed.bias), eps)
        if given.conditions is not None:
            tokens = tokens.add_(given.conditions)
        return Walk(tokens, size, given, ops)

    def _leave(self, walk: Walk) -> Tensor:
        ops = walk.ops
        project, eps = self.network.clf[1], self.network.clf[0].eps
        out = ops.linear(ops.norm(walk.x, eps), project.weight.flatten(1), project.bias)
        return self.network.clf[2](as_image(out, walk.size))

    # The program

    def _compile(self) -> list[Part]:
        network, program = self.network, []
        levels = zip(network.down_downscalers, network.down_blocks, network.down_repeat_mappers, strict=True)
        for i, (downscaler, blocks, mappers) in enumerate(levels):
            if i:
                program.append(Part([_keep, _module(downscaler)]))
            program += self._level(blocks, mappers, with_skip=False)
        ups = zip(network.up_blocks, network.up_repeat_mappers, network.up_upscalers, strict=True)
        for i, (blocks, mappers, upscaler) in enumerate(ups):
            program += self._level(blocks, mappers, with_skip=i > 0)
            if i < len(network.up_blocks) - 1:
                program.append(Part([_drop, _module(upscaler)] if i else [_module(upscaler)]))
        return program

    def _level(self, blocks: Any, mappers: Any, with_skip: bool) -> list[Part]:
        """One level, as often as it repeats; no bias is left over at the end of a repeat."""
        program: list[Part] = []
        for repeat in range(len(mappers) + 1):
            before: BoundMLP | None = None  # whose last bias is left
            waiting: BoundTimestep | None = None  # a TimestepBlock that an AttnBlock may take along
            for i, block in enumerate(blocks):
                if isinstance(block, TimestepBlock):
                    steps, bound = _modulate(waiting), self._timestep(block, before)
                    waiting, before = bound, None
                elif isinstance(block, AttnBlock):
                    bound = BoundAttention(block, waiting, self.attentions, self._make)
                    self.attentions += 1
                    steps = [*_add(before), _attend(bound)]
                    waiting = before = None
                else:
                    bound = BoundMLP(block, self._make)
                    steps = [*_modulate(waiting), *_add(before), _residual(bound, with_skip and i == 0)]
                    waiting, before = None, bound
                program.append(Part(steps, bound))
            program.append(Part([*_modulate(waiting), *_add(before)]))
            if repeat < len(mappers):
                program.append(Part([_mapper(mappers[repeat], self._make)]))
        return program

    def _timestep(self, block: TimestepBlock, before: BoundMLP | None) -> BoundTimestep:
        bound = BoundTimestep(block, before, self.table_size)
        self.table_size = bound.where.stop
        return bound


def _once(operand: Make) -> Make:
    """The same for each repeat of a level, whose blocks are bound anew but have the same weights."""
    made: dict[tuple[int, ...], Any] = {}

    def once(weight: Tensor | list[Tensor]) -> Any:
        where = tuple(part.data_ptr() for part in ([weight] if isinstance(weight, Tensor) else weight))
        if where not in made:
            made[where] = operand(weight)
        return made[where]

    return once


def _keep(walk: Walk) -> None:
    """The level's feature map, for the way up. What follows makes a new one."""
    walk.skips.append((walk.x, walk.size))


def _drop(walk: Walk) -> None:
    walk.skips.pop()


def _module(module: Any) -> Step:
    """A downscaler or upscaler, as the network has it."""

    def run(walk: Walk) -> None:
        h = module(as_image(walk.x, walk.size))
        walk.size = (h.shape[-2], h.shape[-1])
        walk.x = as_tokens(h)

    return run


def _mapper(conv: Any, make: Make | None) -> Step:
    weight = Operand([conv], make)

    def run(walk: Walk) -> None:
        walk.x = walk.ops.project(walk.x, weight(), conv.bias)

    return run


def _add(block: BoundMLP | None) -> list[Step]:
    """The bias that the block left, where nothing takes it along."""
    if block is None:
        return []

    def run(walk: Walk) -> None:
        walk.x.add_(block.after.to(walk.x.dtype))

    return [run]


def _modulate(block: BoundTimestep | None) -> list[Step]:
    if block is None:
        return []

    def run(walk: Walk) -> None:
        block(walk.ops, walk.x, walk.given.table)

    return [run]


def _attend(block: BoundAttention) -> Step:
    def run(walk: Walk) -> None:
        given = walk.given
        block(walk.ops, walk.x, given.table, given.keys[block.index], given.values[block.index])

    return run


def _residual(block: BoundMLP, with_skip: bool) -> Step:
    """Only a block that convolves takes a skip or a ControlNet's residual."""

    def run(walk: Walk) -> None:
        skip = None
        if with_skip and block.convolves:
            skip, size = walk.skips[-1]
            if walk.size != size:  # where a level does not divide the one above
                walk.x = as_tokens(resize(as_image(walk.x, walk.size), size))
                walk.size = size
        if block.convolves:
            control = walk.given.control
            residual = control[walk.blocks] if walk.blocks < len(control) else None
            if residual is not None:
                walk.x.add_(as_tokens(resize(residual, walk.size).to(walk.x)))
            walk.blocks += 1
        block(walk.ops, walk.x, walk.size, skip)

    return run


def as_tokens(image: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H·W, C) contiguous; a view of channels-last memory"""
    return image.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def as_image(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H·W, C) -> (B, C, H, W) in channels-last memory, a view"""
    return tokens.unflatten(1, size).permute(0, 3, 1, 2)
