"""Stage A's decoder bound for speed: tokens, and on CUDA fused kernels and a graph for each size of latent."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..networks.stage_a import MixingResidualBlock, StageA
from ..placement import WeightConsumer
from .blocks import taps_of
from .graphs import Graph, Pool, can_record
from .unet import as_image, as_tokens
from .weights import Weights

HIDDEN_BYTES = 2**28  # of hidden values at once: those of 1024 × 1024 pixels at 384 channels are fewer
CACHED_BYTES = 2**21  # the same on the CPU: what stays in its cache until it is read again
GRAPHS = 2  # sizes of latent whose graphs are kept
LARGEST = 2**18  # positions of all latents up to which a graph is recorded: 2048 × 2048 pixels


class DecoderEngine(WeightConsumer):
    """`engine(latent)` as `stage_a.decode(latent)`, on CUDA in half precision, on the CPU in bf16 or float32.

    Everything else Stage A does itself.

    latent: (B, c_latent, h, w) in the weights' precision -> (B, 3, 4h, 4w)
    """

    def __init__(self, stage_a: StageA):
        self.stage_a = stage_a
        self.forget()

    def forget(self) -> None:
        """Free everything derived from the weights, with the graphs' memory."""
        self._weights = Weights(self.stage_a)
        self._blocks: list[Any] | None = None
        self._graphs: OrderedDict[tuple[int, ...], Graph | None] = OrderedDict()
        self._pool = Pool()

    def offload(self) -> None:
        self.forget()

    def graph_bytes(self, device: torch.device) -> int:
        """Bytes on the device that the allocator keeps for its CUDA graphs."""
        return self._pool.sizes.get(device, 0)

    @torch.inference_mode()
    def __call__(self, latent: Tensor) -> Tensor:
        if not self._weights.unchanged():
            self.forget()
        device = latent.device.type
        bound = BOUND.get(device)
        if bound is None or latent.dtype == SLOW[device] or not self._weights.plain(latent):
            return self.stage_a.decode(latent)
        if self._blocks is None:
            self._blocks = [bind(module, bound) for module in self._modules()]
            if latent.is_cuda:
                from .kernels.launch import compile_ahead

                compile_ahead(lambda: self._decode(latent))
        run = self._graph_of(tuple(latent.shape)) if latent.is_cuda else _directly
        return run(self._decode, latent)

    def _graph_of(self, shape: tuple[int, ...]) -> Callable[..., Tensor]:
        """Of a size that comes again: what comes once, such as a tile, is not worth recording."""
        if shape[0] * shape[2] * shape[3] > LARGEST or not can_record(next(self.stage_a.parameters()).device):
            return _directly
        known = shape in self._graphs
        graph = self._graphs.pop(shape, None) or (Graph(self._pool) if known else None)
        self._graphs[shape] = graph
        while len(self._graphs) > GRAPHS:
            self._graphs.popitem(last=False)
        return graph or _directly

    def _modules(self) -> Iterator[nn.Module]:
        """Of the decoder, one after the other."""
        for block in (*self.stage_a.up_blocks, self.stage_a.out_block):
            yield from block if isinstance(block, nn.Sequential) else (block,)

    def _decode(self, latent: Tensor) -> Tensor:
        assert self._blocks is not None
        x = latent.contiguous(memory_format=torch.channels_last) * self.stage_a.config.scale_factor
        for block in self._blocks:
            x = block(x)
        return x


def _directly(decode: Callable[[Tensor], Tensor], latent: Tensor) -> Tensor:
    return decode(latent)


class Bound:
    """A residual block of Stage A, which changes the image in place."""

    def __init__(self, block: Any):
        expand, _, contract = block.channelwise
        self.eps = block.norm1.eps
        self.gammas = block.gammas.float()
        self.expand, self.expand_bias = expand.weight, expand.bias
        gate, dtype = self.gammas[5], contract.weight.dtype
        self.contract = (contract.weight * gate).to(dtype)  # gate · (W·h + b) = (gate·W)·h + gate·b
        self.contract_bias = contract.bias * gate

    def __call__(self, image: Tensor) -> Tensor:
        size = (image.shape[-2], image.shape[-1])
        x = as_tokens(image)
        self.run_(x, size)
        return as_image(x, size)

    def run_(self, x: Tensor, size: tuple[int, int]) -> None:
        """x: (B, H·W, C), changed in place"""
        raise NotImplementedError

    def at_once(self, limit: int) -> int:
        """Positions whose hidden values take up to `limit` bytes."""
        return max(1, limit // (len(self.expand) * self.expand.element_size()))


class BoundFused(Bound):
    """In fused kernels, of a large image some lines at a time: its hidden values are most of the memory."""

    hidden_bytes = HIDDEN_BYTES

    def __init__(self, block: Any):
        super().__init__(block)
        convolution = block.depthwise[1]
        self.taps, self.taps_bias = taps_of(convolution), convolution.bias

    def run_(self, x: Tensor, size: tuple[int, int]) -> None:
        from .kernels import depthwise, vqgan

        height, width = size
        scale1, shift1, gate1, scale2, shift2, _ = self.gammas
        h = vqgan.norm_modulate(x, scale1, shift1, torch.empty_like(x), self.eps)
        lines = equal_parts(height, self.at_once(self.hidden_bytes) // width)
        for image, around in zip(x, h, strict=True):
            for top in range(0, height, lines):
                part = image[top * width : (top + lines) * width]
                normal = depthwise.depthwise_gate_norm(
                    around, self.taps, self.taps_bias, gate1, part, self.contract_bias, scale2, shift2,
                    torch.empty_like(part), top, height, width, self.eps,
                )  # fmt: skip
                part.addmm_(self._hidden(normal), self.contract.T)

    def _hidden(self, h: Tensor) -> Tensor:
        """GELU of the MLP's first product.  h: (M, C) -> (M, hidden)"""
        from .kernels import products, vqgan

        m, (n, k) = len(h), self.expand.shape
        config = products.choose("linear_gelu", m, n, k, h.device)
        if config is None:
            return vqgan.gelu(F.linear(h, self.expand, self.expand_bias))
        return products.linear_gelu(h, self.expand, self.expand_bias, h.new_empty(m, n), config)


def equal_parts(lines: int, most: int) -> int:
    """Lines of each part, up to `most`, such that the last has about as many: products of like sizes."""
    parts = -(-lines // max(most, 1))
    return -(-lines // parts)


class BoundPointwise:
    """A 1×1 convolution as the product of tokens that it is: faster on CUDA than as a convolution."""

    def __init__(self, convolution: Any):
        self.weight, self.bias = convolution.weight.flatten(1), convolution.bias  # (C_out, C_in), (C_out,)

    def __call__(self, image: Tensor) -> Tensor:
        tokens = F.linear(as_tokens(image), self.weight, self.bias)
        return as_image(tokens, (image.shape[-2], image.shape[-1]))


class BoundPlain(Bound):
    """In plain PyTorch, for the CPU: the gammas stand in the weights of the operations beside them."""

    hidden_bytes = CACHED_BYTES

    def __init__(self, block: Any):
        super().__init__(block)
        convolution = block.depthwise[1]
        scale1, shift1, gate1, scale2, shift2, _ = block.gammas.to(convolution.weight)
        like = torch.ones_like(convolution.bias)  # (C,)
        self.norms = [
            (like * (1 + scale), like * shift) for scale, shift in ((scale1, shift1), (scale2, shift2))
        ]
        self.kernel, self.kernel_bias = convolution.weight * gate1, convolution.bias * gate1
        self.contract_bias = self.contract_bias.to(self.contract.dtype)

    def run_(self, x: Tensor, size: tuple[int, int]) -> None:
        channels = x.shape[-1:]
        h = as_image(F.layer_norm(x, channels, *self.norms[0], self.eps), size)
        bordered = F.pad(h, (1, 1, 1, 1), mode="replicate")
        x.add_(as_tokens(F.conv2d(bordered, self.kernel, self.kernel_bias, groups=len(self.kernel))))
        h = F.layer_norm(x, channels, *self.norms[1], self.eps)
        at_once = self.at_once(self.hidden_bytes)
        for part, rows in zip(x.flatten(0, 1).split(at_once), h.flatten(0, 1).split(at_once), strict=True):
            hidden = torch.ops.aten.gelu_(F.linear(rows, self.expand, self.expand_bias))
            part.add_(self.contract_bias).addmm_(hidden, self.contract.T)


def bind(module: nn.Module, bound: dict[type[nn.Module], Any]) -> Any:
    """The module bound as its kind is, or itself.  Either takes and returns (B, C, H, W)."""
    return next((made(module) for kind, made in bound.items() if isinstance(module, kind)), module)


BOUND: dict[str, dict[type[nn.Module], Any]] = {
    "cuda": {MixingResidualBlock: BoundFused, nn.Conv2d: BoundPointwise},
    "cpu": {MixingResidualBlock: BoundPlain},
}
SLOW = {"cuda": torch.float32, "cpu": torch.float16}  # the precision that is Stage A's own affair
