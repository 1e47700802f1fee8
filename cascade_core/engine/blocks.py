"""The blocks of a network bound for speed: what does not change between steps is computed once.

A bound block changes the feature map x (B, N, C) in place. It leaves its last bias to the block after it (`after`): a
TimestepBlock takes it into its shift, which costs nothing, so that the product before can add straight to x.

Weights may lie elsewhere at every call, and be there only while their block runs. So a block reads them where they lie
when it runs, and what it keeps is small and its own: `prepare` makes it, the first time that the weights are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..networks.layers import ResBlock

Make = Callable[[Any], Any]  # `operand` of operations that multiply by something else than the weights


class Operand:
    """What a product takes for the weights of layers side by side: themselves, or what was made of them."""

    def __init__(self, layers: Sequence[Any], make: Make | None):
        self.layers = layers
        self.made = None if make is None else make(self._weights())

    def _weights(self) -> Tensor | list[Tensor]:
        # A 1×1 convolution's too, as (C_out, C_in).
        return joined([layer.weight.flatten(1) for layer in self.layers])

    def __call__(self) -> Any:
        return self._weights() if self.made is None else self.made


@dataclass
class Missing:
    """What of a run has yet to be made from the blocks' weights, and where it goes.

    embedding     (1, R · (1 + conds)) of the noise condition, unless `table` is known
    tokens        SiLU of the conditioning (B, T, C_cond), unless `keys` and `values` are
    table         (Σ 2C,) float32: scale and shift of every TimestepBlock
    keys, values  one (B, T, C) for each attention block, which stay at their addresses, or None yet
    """

    embedding: Tensor | None
    tokens: Tensor | None
    table: Tensor
    keys: list[Any]
    values: list[Any]


class BoundMLP:
    """A ResBlock, or a FeedForwardBlock, which has no convolution."""

    after: Tensor  # (C,) float32

    def __init__(self, block: Any, make: Make | None):
        self.block, self.eps = block, block.norm.eps
        self.convolves = isinstance(block, ResBlock)
        expand, contract = block.channelwise[0], block.channelwise[4]
        self.expand, self.contract = Operand([expand], make), Operand([contract], make)
        self.prepared = False

    def prepare(self, missing: Missing) -> None:
        if self.prepared:
            return
        _, _, response, _, contract = self.block.channelwise
        if self.convolves:
            self.taps = taps_of(self.block.depthwise)
        self.gamma = own(response.gamma.flatten())
        # W·(h + beta) + b = W·h + (W·beta + b)
        beta = response.beta.flatten().to(contract.weight.dtype)
        self.after = contract.weight.mv(beta).float() + contract.bias.float()
        self.prepared = True

    def __call__(self, ops: Any, x: Tensor, size: tuple[int, int], skip: Tensor | None = None) -> None:
        if self.convolves:
            h = ops.depthwise_norm(x, size, self.taps, self.block.depthwise.bias, self.eps)
        else:
            h = ops.norm(x, self.eps)
        if skip is not None:
            h = torch.cat([h, skip], dim=-1)
        expand_bias = self.block.channelwise[0].bias
        ops.channelwise_(x, h, self.expand(), expand_bias, self.gamma, self.contract())


def own(value: Tensor) -> Tensor:
    """In float32, in memory of its own."""
    return value.to(torch.float32, copy=True)


def taps_of(convolution: Any) -> Tensor:
    """A depthwise 3×3 convolution's weight (C, 1, 3, 3) as the kernels read it, (9, C)."""
    return convolution.weight.flatten(1).T.contiguous()


class BoundTimestep:
    """A TimestepBlock. Its scale and shift stand in a table of the run, with the bias that the block before left."""

    def __init__(self, block: Any, before: BoundMLP | None, start: int):
        self.block, self.before = block, before
        self.where = slice(start, start + block.mapper.out_features)

    def prepare(self, missing: Missing) -> None:
        if missing.embedding is not None:
            missing.table[self.where] = self.scale_shift(missing.embedding)

    def scale_shift(self, embedding: Tensor) -> Tensor:
        """Of one noise condition.  embedding: (1, R · (1 + conds)) -> (2C,) float32"""
        first, *others = embedding.chunk(len(self.block.conds) + 1, dim=1)
        modulation = self.block.mapper(first).float()
        for name, part in zip(self.block.conds, others, strict=True):
            modulation = modulation + getattr(self.block, f"mapper_{name}")(part).float()
        scale, shift = modulation[0].chunk(2)
        if self.before is not None:
            shift = torch.addcmul(shift, self.before.after, 1 + scale)
        return torch.cat([scale, shift])

    def __call__(self, ops: Any, x: Tensor, table: Tensor) -> None:
        ops.modulate_(x, table[self.where])


class BoundAttention:
    """An AttnBlock, with the TimestepBlock before it where there is one."""

    def __init__(self, block: Any, timestep: BoundTimestep | None, index: int, make: Make | None):
        attention = block.attention.attn
        self.block, self.timestep, self.index = block, timestep, index
        self.eps, self.heads, self.self_attn = block.norm.eps, attention.heads, block.self_attn
        self.projections = [attention.to_q, attention.to_k, attention.to_v]
        self.qkv, self.out = Operand(self.projections, make), Operand([attention.out_proj], make)
        self.prepared = False

    def prepare(self, missing: Missing) -> None:
        if not self.prepared:
            self.qkv_bias = torch.cat([layer.bias for layer in self.projections])
            self.out_bias = own(self.block.attention.attn.out_proj.bias)
            self.prepared = True
        if missing.tokens is not None:
            made = self.condition(missing.tokens)
            for kept, new in zip((missing.keys, missing.values), made, strict=True):
                before = kept[self.index]
                kept[self.index] = new if before is None else before.copy_(new)

    def condition(self, activated: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the conditioning, the same at every step.  SiLU(tokens): (B, T, C_cond) -> (B, T, C)"""
        mapped = self.block.kv_mapper[1](activated)
        _, to_k, to_v = self.projections
        return to_k(mapped), to_v(mapped)

    def __call__(self, ops: Any, x: Tensor, table: Tensor, key: Tensor, value: Tensor) -> None:
        if self.timestep is None:
            h = ops.norm(x, self.eps)
            x.add_(self.out_bias.to(x.dtype))
        else:
            h = ops.modulate_norm_(x, table[self.timestep.where], self.out_bias, self.eps)
        qkv = ops.project(h, self.qkv(), self.qkv_bias)
        ops.add_linear_(x, ops.attention(qkv, key, value, self.heads, self.self_attn), self.out())


def joined(weights: list[Tensor]) -> Tensor | list[Tensor]:
    """Weights (C_i, K) that lie one after the other in memory as one (Σ C_i, K), without a copy; else as they are."""
    first, end = weights[0], weights[0].storage_offset()
    if len(weights) == 1:
        return first
    for weight in weights:
        same = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and weight.is_contiguous() and weight.storage_offset() == end):
            return weights
        end += weight.numel()
    return first.as_strided((sum(len(weight) for weight in weights), first.shape[1]), first.stride())


def join_(block: Any) -> None:
    """Lay an AttnBlock's weights of to_q, to_k and to_v one after the other, so that one product serves all three."""
    attention = block.attention.attn
    layers = [attention.to_q, attention.to_k, attention.to_v]
    if isinstance(joined([layer.weight for layer in layers]), Tensor):
        return
    # A parameter can take only what is made in the mode that it was made in itself.
    with torch.inference_mode(layers[0].weight.is_inference()), torch.no_grad():
        together = torch.cat([layer.weight.detach() for layer in layers])
        for layer, part in zip(layers, together.split([len(layer.weight) for layer in layers]), strict=True):
            layer.weight.data = part
