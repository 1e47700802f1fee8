"""The blocks of a network, bound to their weights, with everything that is constant across steps precomputed.

A bound block changes the feature map x (B, N, C) in place. It leaves out its last bias (`deferred_bias`), so that its
last product can add straight to x; a TimestepBlock after it adds that bias with its shift, at no cost.

Weights may be at another address at every call, and available only while their block runs. So a block looks up their
addresses when it runs. Values derived from weights are small copies, made by `prepare` when the weights are first
available.

For fp16, x may be divided by `scale` (networks/fp16.py); biases of values added to it then are divided too.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..networks.fp16 import divide, divide_
from ..networks.quantisation import E4M3, QuantisedLayer, QuantisedWeight, dequantise
from .layout import as_image, concatenated, resized
from .state import ForwardState, RunCache
from .workspace import empty

Formats = Collection[torch.dtype]  # 8-bit formats that products take undequantised: `Operations.formats`


class ProductWeight:
    """The weights of several layers, side by side, in the form that a product takes.

    8-bit weights are passed on unchanged if their format is in `formats`; else dequantised for this product alone.
    """

    def __init__(self, layers: Sequence[Any], formats: Formats):
        self.layers, self.formats = layers, formats

    def __call__(self) -> Any:
        first: Any = self.layers[0]
        if not isinstance(first, QuantisedLayer):
            # Flattened, because a 1×1 convolution's weight is (C_out, C_in, 1, 1).
            return side_by_side([layer.weight.flatten(1) for layer in self.layers])
        parts = [layer.quantised for layer in self.layers]
        if first.weight.dtype in self.formats:
            return quantised_side_by_side(parts)
        return scratch(parts, first.bias)


def scratch(parts: Sequence[QuantisedWeight], like: Any) -> Tensor:
    """8-bit weights (C_i, K) in the dtype of `like`, as one (Σ C_i, K)."""
    sizes = [len(part.weight8) for part in parts]
    out = empty((sum(sizes), parts[0].weight8.shape[1]), like)
    for part, rows in zip(parts, out.split(sizes), strict=True):
        dequantise(part, like.dtype, rows)
    return out


class DividedBias:
    """A layer's bias divided by `scale`: the layer's own tensor where scale is 1, else a copy made on first use."""

    def __init__(self, layer: Any, scale: float):
        self.layer, self.scale = layer, scale
        self.divided: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.scale == 1:
            return self.layer.bias
        if self.divided is None:
            self.divided = divide(self.layer.bias, self.scale)
        return self.divided


class BoundBlock:
    """One step of a network's program.

    block: the network's block whose weights it reads, or None if it reads none that can be streamed
    """

    block: Any = None

    def prepare(self, cache: RunCache) -> None:
        """Computes the cache entries of this block that are missing. Reads its weights."""

    def run(self, state: ForwardState) -> None:
        raise NotImplementedError


class BoundFeedForward(BoundBlock):
    """A FeedForwardBlock."""

    deferred_bias: Tensor  # (C,) float32
    rounded_bias: Tensor  # the same in the precision of the weights

    def __init__(self, block: Any, formats: Formats, scale: float, with_skip: bool = False):
        self.block, self.eps = block, block.norm.eps
        self.scale = scale
        # A skip is not normalised, so it comes divided by `scale`, and so must what it is joined to.
        self.h_scale = scale if with_skip else 1.0
        expand, contract = block.channelwise[0], block.channelwise[4]
        self.expand, self.contract = ProductWeight([expand], formats), ProductWeight([contract], formats)
        self.expand_bias = DividedBias(expand, self.h_scale)
        self.prepared = False

    def prepare(self, cache: RunCache) -> None:
        if not self.prepared:
            self.derive()
            self.prepared = True

    def derive(self) -> None:
        """Copies and folds the block's small weights."""
        _, _, response, _, contract = self.block.channelwise
        self.gamma = float32_copy(response.gamma.flatten())
        # W·(h + beta) + b = W·h + (W·beta + b)
        beta = divide(response.beta.flatten().to(contract.bias.dtype), self.scale)
        self.deferred_bias = matrix_of(contract).mv(beta).float() + contract.bias.float() / self.scale
        self.rounded_bias = self.deferred_bias.to(contract.bias.dtype)

    def run(self, state: ForwardState) -> None:
        self.add_mlp(state, state.ops.norm(state.x, self.eps))

    def add_mlp(self, state: ForwardState, h: Tensor) -> None:
        """x += MLP(h), without its last bias.  h: (B, N, C or C + C_skip)"""
        state.ops.channelwise_(
            state.x,
            h,
            self.expand(),
            self.expand_bias(),
            self.gamma,
            self.contract(),
            self.h_scale,
            self.scale,
        )


class BoundResBlock(BoundFeedForward):
    """A ResBlock, which may also take a skip and a ControlNet's residual."""

    def __init__(self, block: Any, formats: Formats, scale: float, with_skip: bool):
        super().__init__(block, formats, scale, with_skip)
        self.with_skip = with_skip
        self.depthwise_bias = DividedBias(block.depthwise, scale)

    def derive(self) -> None:
        super().derive()
        self.taps = taps_of(self.block.depthwise)

    def run(self, state: ForwardState) -> None:
        skip = None
        if self.with_skip:
            skip, size = state.skips[-1]
            if state.size != size:  # where a level does not divide the one above
                state.x = resized(as_image(state.x, state.size), size, state.x)
                state.size = size
        control = state.cache.control
        residual = control[state.resblocks] if state.resblocks < len(control) else None
        if residual is not None:
            state.x.add_(resized(residual, state.size, state.x))
        state.resblocks += 1
        joins = skip is not None
        h = state.ops.depthwise_norm(state.x, state.size, self.taps, self.depthwise_bias(), self.eps, joins)
        self.add_mlp(state, h if skip is None else concatenated(divide_(h, self.scale), skip, dim=-1))


class AddDeferredBias(BoundBlock):
    """Adds the deferred bias of an MLP that no TimestepBlock follows."""

    def __init__(self, mlp: BoundFeedForward):
        self.mlp = mlp

    def run(self, state: ForwardState) -> None:
        state.x.add_(self.mlp.rounded_bias)


class BoundTimestep(BoundBlock):
    """A TimestepBlock. Its scale and shift are in the run's table, with the deferred bias of the MLP before it.

    fused: the attention block after it modulates x
    """

    def __init__(self, block: Any, mlp: BoundFeedForward | None, start: int, scale: float):
        self.block, self.mlp, self.scale = block, mlp, scale
        self.columns = slice(start, start + block.mapper.out_features)
        self.fused = False

    def prepare(self, cache: RunCache) -> None:
        if cache.noise_embedding is not None:
            cache.table[self.columns] = self.scale_shift(cache.noise_embedding)

    def scale_shift(self, embedding: Tensor) -> Tensor:
        """Scale and divided shift of one noise condition.  embedding: (1, R · (1 + conds)) -> (2C,) float32"""
        first, *others = divide(embedding, self.scale).chunk(len(self.block.conds) + 1, dim=1)
        modulation = self._map(self.block.mapper, first)
        for name, part in zip(self.block.conds, others, strict=True):
            modulation = modulation + self._map(getattr(self.block, f"mapper_{name}"), part)
        scale, shift = modulation[0].chunk(2)
        scale = scale * self.scale
        if self.mlp is not None:
            shift = torch.addcmul(shift, self.mlp.deferred_bias, 1 + scale)
        return torch.cat([scale, shift])

    def _map(self, layer: Any, embedding: Tensor) -> Tensor:
        return F.linear(embedding, layer.weight, divide(layer.bias, self.scale)).float()

    def run(self, state: ForwardState) -> None:
        if not self.fused:
            state.ops.modulate_(state.x, state.cache.table[self.columns])


class BoundAttention(BoundBlock):
    """An AttnBlock, fused with the TimestepBlock before it where there is one."""

    def __init__(
        self, block: Any, timestep: BoundTimestep | None, index: int, formats: Formats, scale: float
    ):
        attention = block.attention.attn
        self.block, self.timestep, self.index, self.scale = block, timestep, index, scale
        self.eps, self.heads, self.self_attn = block.norm.eps, attention.heads, block.self_attn
        self.projections = [attention.to_q, attention.to_k, attention.to_v]
        self.qkv, self.out = (
            ProductWeight(self.projections, formats),
            ProductWeight([attention.out_proj], formats),
        )
        self.prepared = False
        if timestep is not None:
            timestep.fused = True

    def prepare(self, cache: RunCache) -> None:
        if not self.prepared:
            self.qkv_bias = torch.cat([layer.bias for layer in self.projections])
            bias = self.block.attention.attn.out_proj.bias
            self.out_bias = float32_copy(bias) / self.scale
            self.rounded_bias = self.out_bias.to(bias.dtype)
            quantises = E4M3 in self.qkv.formats and isinstance(self.projections[2], QuantisedLayer)
            self.peak = largest_output(self.projections[2]) if quantises else None
            self.prepared = True
        if cache.cond_tokens is not None:
            self._keep(cache.keys, cache.values, computed=self.condition(cache.cond_tokens))
            if self.peak is not None:
                conditions = cache.values[self.index].abs().amax().float()
                self._keep(cache.peaks, computed=[torch.maximum(self.peak, conditions)])

    def _keep(self, *lists: list[Any], computed: Sequence[Tensor]) -> None:
        """Stores each value at this block's index of its list, at the address of the previous value."""
        for entries, value in zip(lists, computed, strict=True):
            entry = entries[self.index]
            entries[self.index] = value if entry is None else entry.copy_(value)

    def condition(self, activated: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the conditioning.  SiLU(tokens): (B, T, C_cond) -> (B, T, C) each"""
        mapped = self.block.kv_mapper[1](activated)
        _, to_k, to_v = self.projections
        return to_k(mapped), to_v(mapped)

    def run(self, state: ForwardState) -> None:
        ops, cache, x = state.ops, state.cache, state.x
        if self.timestep is None:
            h = ops.norm(x, self.eps)
            x.add_(self.rounded_bias)
        else:
            h = ops.modulate_norm_(x, cache.table[self.timestep.columns], self.out_bias, self.eps)
        qkv = ops.project(h, self.qkv(), self.qkv_bias)
        key, value = cache.keys[self.index], cache.values[self.index]
        peak = cache.peaks[self.index]
        attended = ops.attention(qkv, key, value, self.heads, self.self_attn, self.scale, peak)
        ops.add_linear_(x, attended, self.out())


def matrix_of(layer: Any) -> Tensor:
    """A layer's weight (C_out, K) in the precision that it computes in."""
    if isinstance(layer, QuantisedLayer):
        return dequantise(layer.quantised, layer.bias.dtype)  # type: ignore[union-attr] (a block's layers have one)
    return layer.weight


def float32_copy(value: Tensor) -> Tensor:
    return value.to(torch.float32, copy=True)


def largest_output(layer: Any) -> Tensor:
    """Upper bound (1,) of the magnitudes of the layer's output for normed rows (·, C) of a length up to √C.

    The bound includes a quarter more for the rounding of rows and weights to e4m3.
    """
    weight = dequantise(layer.quantised, torch.float32)
    largest = torch.linalg.vector_norm(weight, dim=1) * weight.shape[1] ** 0.5 + layer.bias.float().abs()
    return 1.25 * largest.amax().view(1)


def taps_of(convolution: Any) -> Tensor:
    """A depthwise 3×3 convolution's weight (C, 1, 3, 3) as the kernels read it, (9, C)."""
    return convolution.weight.flatten(1).T.contiguous()


def side_by_side(weights: list[Tensor]) -> Tensor | list[Tensor]:
    """Tensors (C_i, …) that are adjacent in memory as one view (Σ C_i, …); others as they are."""
    first, end = weights[0], weights[0].storage_offset()
    if len(weights) == 1:
        return first
    for weight in weights:
        same_storage = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same_storage and weight.is_contiguous() and weight.storage_offset() == end):
            return weights
        end += weight.numel()
    return first.as_strided((sum(len(weight) for weight in weights), *first.shape[1:]), first.stride())


def quantised_side_by_side(weights: list[QuantisedWeight]) -> QuantisedWeight | list[QuantisedWeight]:
    """`side_by_side` for weights and scales."""
    weight8, scale = (side_by_side(list(parts)) for parts in zip(*weights, strict=True))
    if isinstance(weight8, Tensor) and isinstance(scale, Tensor):
        return QuantisedWeight(weight8, scale)
    return weights


def join_(block: Any) -> None:
    """Moves an AttnBlock's weights of to_q, to_k and to_v next to each other, so that one product serves all three."""
    attention = block.attention.attn
    layers = [attention.to_q, attention.to_k, attention.to_v]
    _join_tensors([layer.weight for layer in layers])
    if isinstance(attention.to_q, QuantisedLayer):
        _join_tensors([layer.weight_scale for layer in layers])


def _join_tensors(tensors: list[Tensor]) -> None:
    if isinstance(side_by_side(tensors), Tensor):
        return
    # A tensor's data can only be replaced by data made in the same mode (inference or not) as the tensor itself.
    with torch.inference_mode(tensors[0].is_inference()), torch.no_grad():
        joined = torch.cat([tensor.detach() for tensor in tensors])
        for tensor, part in zip(tensors, joined.split([len(tensor) for tensor in tensors]), strict=True):
            tensor.data = part
