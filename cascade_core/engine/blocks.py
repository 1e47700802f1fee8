"""The blocks of a network bound for speed: what does not change between steps is computed when they are bound.

A bound block changes the feature map x (B, N, C) in place. It leaves its last bias to the block after it (`after`): a
TimestepBlock takes it into its shift, which costs nothing, so that the product before can add straight to x.
What its products take for a weight is for the operations to say (`operand`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..layers import ResBlock

Operand = Callable[[Any], Any]  # `operations.operand`


class BoundMLP:
    """A ResBlock, or a FeedForwardBlock, which has no convolution."""

    def __init__(self, block: Any, operand: Operand):
        expand, _, response, _, contract = block.channelwise
        self.taps: Tensor | None = None
        if isinstance(block, ResBlock):
            self.taps = taps_of(block.depthwise)
            self.taps_bias = block.depthwise.bias
        self.eps = block.norm.eps
        self.expand, self.expand_bias = operand(expand.weight), expand.bias
        self.gamma = response.gamma.flatten().float()
        self.contract = operand(contract.weight)
        # W·(h + beta) + b = W·h + (W·beta + b)
        beta = response.beta.flatten().to(contract.weight.dtype)
        self.after = contract.weight.mv(beta).float() + contract.bias.float()  # (C,)

    def __call__(self, ops: Any, x: Tensor, size: tuple[int, int], skip: Tensor | None = None) -> None:
        if self.taps is None:
            h = ops.norm(x, self.eps)
        else:
            h = ops.depthwise_norm(x, size, self.taps, self.taps_bias, self.eps)
        if skip is not None:
            h = torch.cat([h, skip], dim=-1)
        ops.channelwise_(x, h, self.expand, self.expand_bias, self.gamma, self.contract)


def taps_of(convolution: Any) -> Tensor:
    """A depthwise 3×3 convolution's weight (C, 1, 3, 3) as the kernels read it, (9, C)."""
    return convolution.weight.flatten(1).T.contiguous()


class BoundTimestep:
    """A TimestepBlock, with the bias that the block before left. Its scale and shift stand in a table of the run."""

    def __init__(self, block: Any, before: Tensor | None, start: int):
        self.block, self.before = block, before
        self.where = slice(start, start + block.mapper.out_features)

    def scale_shift(self, embedding: Tensor) -> Tensor:
        """Of one noise condition.  embedding: (1, R · (1 + conds)) -> (2C,) float32"""
        first, *others = embedding.chunk(len(self.block.conds) + 1, dim=1)
        modulation = self.block.mapper(first).float()
        for name, part in zip(self.block.conds, others, strict=True):
            modulation = modulation + getattr(self.block, f"mapper_{name}")(part).float()
        scale, shift = modulation[0].chunk(2)
        if self.before is not None:
            shift = torch.addcmul(shift, self.before, 1 + scale)
        return torch.cat([scale, shift])

    def __call__(self, ops: Any, x: Tensor, table: Tensor) -> None:
        ops.modulate_(x, table[self.where])


class BoundAttention:
    """An AttnBlock, with the TimestepBlock before it where there is one."""

    def __init__(self, block: Any, timestep: BoundTimestep | None, index: int, operand: Operand):
        attention = block.attention.attn
        self.block, self.timestep, self.index = block, timestep, index
        self.eps, self.heads, self.self_attn = block.norm.eps, attention.heads, block.self_attn
        self.projections = [attention.to_q, attention.to_k, attention.to_v]
        self.qkv = operand(joined([layer.weight for layer in self.projections]))
        self.qkv_bias = torch.cat([layer.bias for layer in self.projections])
        self.out = operand(attention.out_proj.weight)
        self.out_bias = attention.out_proj.bias.float()

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
        qkv = ops.project(h, self.qkv, self.qkv_bias)
        ops.add_linear_(x, ops.attention(qkv, key, value, self.heads, self.self_attn), self.out)


def joined(weights: list[Tensor]) -> Tensor | list[Tensor]:
    """Weights (C_i, K) that lie one after the other in memory as one (Σ C_i, K), without a copy; else as they are."""
    first, end = weights[0], weights[0].storage_offset()
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
