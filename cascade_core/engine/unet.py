"""Stage B and Stage C bound for speed: the same weights, walked as a flat program over tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layers import AttnBlock, ResBlock, TimestepBlock, resize
from ..unet import UNet
from . import operations
from .blocks import BoundAttention, BoundMLP, BoundTimestep, Operand, join_


@dataclass
class Given:
    """What a forward needs beside x, in the network's dtype on its device.

    table       (Σ 2C,) float32: scale and shift of every TimestepBlock
    keys        one (B, T, C) for each attention block, as `values`
    conditions  (B, N, C) that is added to the embedded x, or None (Stage C has none)
    control     a residual (B, C, h, w) or None for each ResBlock
    """

    table: Tensor
    keys: list[Tensor]
    values: list[Tensor]
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


class BoundUNet:
    """A network's program. Derived values are made here; a network whose weights change is bound anew."""

    def __init__(self, network: UNet, join: bool = False, operand: Operand = operations.operand):
        """`join`: lay the attention's input weights side by side, which moves them (to where they are read faster).

        operand: that of the operations with which it will be called.
        """
        self.network: Any = network  # its modules are attributes of any type
        self.timesteps: list[BoundTimestep] = []
        self.attentions: list[BoundAttention] = []
        self.table_size = 0
        if join:
            for module in network.modules():
                if isinstance(module, AttnBlock):
                    join_(module)
        self._operand = _once(operand)
        self.program = self._compile()

    # What is computed once per run

    def table(self, r: float, extra: dict[str, float]) -> Tensor:
        """Scale and shift of every TimestepBlock at one noise condition.  -> (Σ 2C,) float32"""
        weight = self.network.embedding[1].weight
        values = {name: torch.tensor([value], device=weight.device) for name, value in extra.items()}
        embedding = self.network.embed_timesteps(torch.tensor([r], device=weight.device), values)
        return torch.cat([block.scale_shift(embedding.to(weight.dtype)) for block in self.timesteps])

    def condition(self, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of every attention block.  tokens: (B, T, C_cond)"""
        activated = F.silu(tokens)
        pairs = [block.condition(activated) for block in self.attentions]
        return [key for key, _ in pairs], [value for _, value in pairs]

    # A forward

    def __call__(self, ops: Any, x: Tensor, given: Given) -> Tensor:
        """x: (B, c_in, H, W) -> the noise in it, (B, c_out, H, W)"""
        h = self.network.embedding[0](x)  # pixels to channels
        size = (h.shape[-2], h.shape[-1])
        embed, eps = self.network.embedding[1], self.network.embedding[2].eps
        tokens = ops.norm(ops.linear(as_tokens(h), embed.weight.flatten(1), embed.bias), eps)
        if given.conditions is not None:
            tokens = tokens.add_(given.conditions)
        walk = Walk(tokens, size, given, ops)
        for step in self.program:
            step(walk)
        project, eps = self.network.clf[1], self.network.clf[0].eps
        out = ops.linear(ops.norm(walk.x, eps), project.weight.flatten(1), project.bias)
        return self.network.clf[2](as_image(out, walk.size))

    # The program

    def _compile(self) -> list[Step]:
        network, program = self.network, []
        levels = zip(network.down_downscalers, network.down_blocks, network.down_repeat_mappers, strict=True)
        for i, (downscaler, blocks, mappers) in enumerate(levels):
            if i:
                program += [_keep, _module(downscaler)]
            program += self._level(blocks, mappers, with_skip=False)
        ups = zip(network.up_blocks, network.up_repeat_mappers, network.up_upscalers, strict=True)
        for i, (blocks, mappers, upscaler) in enumerate(ups):
            program += self._level(blocks, mappers, with_skip=i > 0)
            if i < len(network.up_blocks) - 1:
                program += [_drop] if i else []
                program.append(_module(upscaler))
        return program

    def _level(self, blocks: Any, mappers: Any, with_skip: bool) -> list[Step]:
        """One level, as often as it repeats; no bias is left over at the end of a repeat."""
        program: list[Step] = []
        for repeat in range(len(mappers) + 1):
            before: Tensor | None = None  # the bias that the last block left
            waiting: BoundTimestep | None = None  # a TimestepBlock that an AttnBlock may take along
            for i, block in enumerate(blocks):
                if isinstance(block, TimestepBlock):
                    if waiting is not None:
                        program.append(_modulate(waiting))
                    waiting, before = self._timestep(block, before), None
                elif isinstance(block, AttnBlock):
                    program += _add(before)
                    bound = BoundAttention(block, waiting, len(self.attentions), self._operand)
                    self.attentions.append(bound)
                    program.append(_attend(bound))
                    waiting = before = None
                else:
                    program += [_modulate(waiting)] if waiting is not None else []
                    waiting = None
                    program += _add(before)
                    bound = BoundMLP(block, self._operand)
                    convolves = isinstance(
                        block, ResBlock
                    )  # the only kind that a skip or a ControlNet is for
                    program.append(_residual(bound, convolves and with_skip and i == 0, convolves))
                    before = bound.after
            program += [_modulate(waiting)] if waiting is not None else []
            program += _add(before)
            if repeat < len(mappers):
                program.append(_mapper(mappers[repeat], self._operand))
        return program

    def _timestep(self, block: TimestepBlock, before: Tensor | None) -> BoundTimestep:
        bound = BoundTimestep(block, before, self.table_size)
        self.table_size = bound.where.stop
        self.timesteps.append(bound)
        return bound


def _once(operand: Operand) -> Operand:
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


def _mapper(conv: Any, operand: Operand) -> Step:
    weight = operand(conv.weight.flatten(1))

    def run(walk: Walk) -> None:
        walk.x = walk.ops.project(walk.x, weight, conv.bias)

    return run


def _add(bias: Tensor | None) -> list[Step]:
    if bias is None:
        return []

    def run(walk: Walk) -> None:
        walk.x.add_(bias.to(walk.x.dtype))

    return [run]


def _modulate(block: BoundTimestep) -> Step:
    def run(walk: Walk) -> None:
        block(walk.ops, walk.x, walk.given.table)

    return run


def _attend(block: BoundAttention) -> Step:
    def run(walk: Walk) -> None:
        given = walk.given
        block(walk.ops, walk.x, given.table, given.keys[block.index], given.values[block.index])

    return run


def _residual(block: BoundMLP, with_skip: bool, convolves: bool) -> Step:
    def run(walk: Walk) -> None:
        skip = None
        if with_skip:
            skip, size = walk.skips[-1]
            if walk.size != size:  # where a level does not divide the one above
                walk.x = as_tokens(resize(as_image(walk.x, walk.size), size))
                walk.size = size
        if convolves:
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
