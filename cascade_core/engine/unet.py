"""Stage B and Stage C as a flat program of bound blocks over tokens (B, N, C)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..networks.fp16 import divide, divide_, divided_bias, stream_scale
from ..networks.layers import AttnBlock, ResBlock, TimestepBlock
from ..networks.unet import UNet
from ..placement.stream import WeightStream
from .blocks import (
    AddDeferredBias,
    BoundAttention,
    BoundBlock,
    BoundFeedForward,
    BoundResBlock,
    BoundTimestep,
    DividedBias,
    Formats,
    ProductWeight,
    join_,
)
from .layout import as_image, as_tokens, interpolated, patches, shuffle, unpatched, unshuffle
from .operations import Operations
from .state import ForwardState, RunCache


class BoundUNet:
    """A network's program. Valid while the weights keep their values, wherever they are."""

    def __init__(self, network: UNet, join: bool = False, formats: Formats = ()):
        """join: move the attention's input weights next to each other in memory, which makes reading them faster.

        formats: `Operations.formats` of the operations that the program will be run with
        """
        self.network: Any = network  # its modules are attributes of any type
        self.scale = stream_scale(network)
        self.attentions = self.table_size = 0
        if join:
            for module in network.modules():
                if isinstance(module, AttnBlock):
                    join_(module)
        self._formats = formats
        self.program = self._compile()

    def embed_noise(self, r: float, extra: dict[str, float]) -> Tensor:
        """The embedding of one noise condition that TimestepBlocks read.  -> (1, R · (1 + conds))"""
        weight = self.network.embedding[1].weight
        values = {name: torch.tensor([value], device=weight.device) for name, value in extra.items()}
        return self.network.embed_timesteps(torch.tensor([r], device=weight.device), values).to(weight.dtype)

    def prepare(self, cache: RunCache) -> None:
        """Computes all cache entries that are missing. All weights are available."""
        for block in self.program:
            block.prepare(cache)

    def run(self, ops: Operations, x: Tensor, cache: RunCache) -> Tensor:
        """x: (B, c_in, H, W) -> the noise in it, (B, c_out, H, W); the cache is complete"""
        state = self._embed(ops, x, cache)
        for block in self.program:
            block.run(state)
        return self._output(state)

    def run_streamed(self, ops: Operations, x: Tensor, cache: RunCache, stream: WeightStream) -> Tensor:
        """`prepare` and `run`, block by block, each while its weights are available."""
        state = self._embed(ops, x, cache)
        for block in self.program:
            if block.block is None:
                block.run(state)
            else:
                stream.pre_forward(block.block)
                block.prepare(cache)
                block.run(state)
                stream.post_forward(block.block)
        return self._output(state)

    def _embed(self, ops: Operations, x: Tensor, cache: RunCache) -> ForwardState:
        side = self.network.config.patch_size
        size = (x.shape[-2] // side, x.shape[-1] // side)
        embed, eps = self.network.embedding[1], self.network.embedding[2].eps
        tokens = ops.norm(ops.linear(unshuffle(x, side), embed.weight.flatten(1), embed.bias), eps)
        if cache.conditions is not None:
            tokens = tokens.add_(cache.conditions)
        return ForwardState(ops, cache, divide_(tokens, self.scale), size)

    def _output(self, state: ForwardState) -> Tensor:
        ops = state.ops
        project, eps = self.network.clf[1], self.network.clf[0].eps
        out = ops.linear(ops.norm(state.x, eps), project.weight.flatten(1), project.bias)
        return shuffle(out, state.size, self.network.config.patch_size)

    def _compile(self) -> list[BoundBlock]:
        network, program = self.network, []
        levels = zip(network.down_downscalers, network.down_blocks, network.down_repeat_mappers, strict=True)
        for i, (downscaler, blocks, mappers) in enumerate(levels):
            if i:
                program += [PushSkip(), BoundResample(downscaler, self.scale)]
            program += self._level(blocks, mappers, with_skip=False)
        ups = zip(network.up_blocks, network.up_repeat_mappers, network.up_upscalers, strict=True)
        for i, (blocks, mappers, upscaler) in enumerate(ups):
            program += self._level(blocks, mappers, with_skip=i > 0)
            if i:
                program.append(PopSkip())
            if i < len(network.up_blocks) - 1:
                program.append(BoundResample(upscaler, self.scale))
        return program

    def _level(self, blocks: Any, mappers: Any, with_skip: bool) -> list[BoundBlock]:
        """One level, as often as it repeats. No bias is deferred past the end of a repeat."""
        program: list[BoundBlock] = []
        for repeat in range(len(mappers) + 1):
            last: BoundBlock | None = None
            for i, block in enumerate(blocks):
                mlp = last if isinstance(last, BoundFeedForward) else None
                if isinstance(block, TimestepBlock):
                    last = self._timestep(block, mlp)
                else:
                    if mlp is not None:
                        program.append(AddDeferredBias(mlp))
                    if isinstance(block, AttnBlock):
                        last = self._attention(block, last if isinstance(last, BoundTimestep) else None)
                    elif isinstance(block, ResBlock):
                        last = BoundResBlock(block, self._formats, self.scale, with_skip and i == 0)
                    else:
                        last = BoundFeedForward(block, self._formats, self.scale)
                program.append(last)
            if isinstance(last, BoundFeedForward):
                program.append(AddDeferredBias(last))
            if repeat < len(mappers):
                program.append(BoundRepeatMapper(mappers[repeat], self._formats, self.scale))
        return program

    def _timestep(self, block: TimestepBlock, mlp: BoundFeedForward | None) -> BoundTimestep:
        bound = BoundTimestep(block, mlp, self.table_size, self.scale)
        self.table_size = bound.columns.stop
        return bound

    def _attention(self, block: AttnBlock, timestep: BoundTimestep | None) -> BoundAttention:
        bound = BoundAttention(block, timestep, self.attentions, self._formats, self.scale)
        self.attentions += 1
        return bound


class PushSkip(BoundBlock):
    """Keeps the level's feature map for the way up. The next block makes a new one."""

    def run(self, state: ForwardState) -> None:
        state.skips.append((state.x, state.size))


class PopSkip(BoundBlock):
    def run(self, state: ForwardState) -> None:
        state.skips.pop()


class BoundResample(BoundBlock):
    """A downscaler or upscaler: a norm, then a convolution, in Stage C perhaps with a resize."""

    def __init__(self, module: Any, scale: float):
        self.norm, self.resampler = module
        self.scale = scale
        self.steps = list(getattr(self.resampler, "blocks", [self.resampler]))
        self.biases = {step: DividedBias(step, scale) for step in self.steps}
        self.products: dict[Any, tuple[Tensor, Tensor]] = {}

    def run(self, state: ForwardState) -> None:
        if not state.ops.resample_by_products:
            h = divide(self.norm(as_image(state.x, state.size)), self.scale)
            h = divided_bias(self.resampler, h, self.scale)
            state.x, state.size = as_tokens(h), (h.shape[-2], h.shape[-1])
            return
        state.x = divide_(state.ops.norm(state.x, self.norm.eps), self.scale)
        for step in self.steps:
            if isinstance(step, nn.Upsample):
                factor, (height, width) = step.scale_factor, state.size
                size = (int(height * factor), int(width * factor))  # type: ignore[operator] (one number for both)
                state.x, state.size = as_tokens(interpolated(as_image(state.x, state.size), size)), size
            elif not isinstance(step, nn.Identity):
                self._multiply(step, state)

    def _multiply(self, convolution: Any, state: ForwardState) -> None:
        """A convolution of one position, or of squares of 2 × 2, as a product."""
        if convolution.stride == (1, 1):
            state.x = state.ops.linear(state.x, convolution.weight.flatten(1), self.biases[convolution]())
            return
        if convolution not in self.products:
            self.products[convolution] = square_product(convolution, self.biases[convolution]())
        weight, bias = self.products[convolution]
        (height, width), down = state.size, not isinstance(convolution, nn.ConvTranspose2d)
        x = patches(state.x, state.size) if down else state.x
        x = state.ops.linear(x, weight, bias)
        state.x = x if down else unpatched(x, state.size)
        state.size = (height // 2, width // 2) if down else (2 * height, 2 * width)


def square_product(convolution: Any, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a product of tokens that is a convolution of 2 × 2 with a stride of 2, for `layout.patches`.

    bias: the convolution's, or a fraction.  Conv2d: weight (C_out, 4 · C_in).  ConvTranspose2d: (4 · C_out, C_in)
    """
    weight = convolution.weight
    if isinstance(convolution, nn.ConvTranspose2d):
        return weight.permute(2, 3, 1, 0).flatten(0, 2).contiguous(), bias.repeat(4)
    return weight.permute(0, 2, 3, 1).flatten(1).contiguous(), bias


class BoundRepeatMapper(BoundBlock):
    """The 1×1 convolution between two repeats of a level."""

    def __init__(self, convolution: Any, formats: Formats, scale: float):
        self.weight, self.bias = ProductWeight([convolution], formats), DividedBias(convolution, scale)

    def run(self, state: ForwardState) -> None:
        state.x = state.ops.project(state.x, self.weight(), self.bias())
