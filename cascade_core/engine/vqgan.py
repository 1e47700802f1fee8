"""Stage A's decoder over tokens, on CUDA with fused kernels and a CUDA graph for each size of latent."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..networks.stage_a import MixingResidualBlock, StageA
from ..placement import WeightConsumer
from .blocks import as_image, as_tokens, taps_of
from .graphs import CapturedForward, Graphed, GraphPool, can_capture
from .lru import LRU
from .weights import WeightSnapshot

HIDDEN_BYTES = 2**28  # of hidden values at a time: more than those of 1024 × 1024 pixels at 384 channels
CACHED_BYTES = 2**21  # the same on the CPU: they stay in its cache until they are read again
GRAPHS = 2  # sizes of latent whose graphs are kept
MAX_GRAPH_POSITIONS = 2**18  # of all latents of a batch: 2048 × 2048 pixels


class DecoderEngine(WeightConsumer):
    """`engine(latent)` as `stage_a.decode(latent)`, on CUDA in half precision, on the CPU in bf16 or float32.

    In any other precision it calls Stage A itself.

    latent: (B, c_latent, h, w) in the weights' precision -> (B, 3, 4h, 4w)
    """

    def __init__(self, stage_a: StageA):
        self.stage_a = stage_a
        self.forget()

    def forget(self) -> None:
        """Frees everything derived from the weights, with the graphs' memory."""
        self._weights = WeightSnapshot(self.stage_a)
        self._blocks: list[Any] | None = None
        self._graphs: LRU[Graphed] = LRU(GRAPHS)
        self._pool = GraphPool()

    def offload(self) -> None:
        self.forget()

    def graph_bytes(self, device: torch.device) -> int:
        """Bytes on the device that the allocator keeps for the CUDA graphs."""
        return self._pool.sizes.get(device, 0)

    @torch.inference_mode()
    def __call__(self, latent: Tensor) -> Tensor:
        if not self._weights.unchanged():
            self.forget()
        device = latent.device.type
        bindings = BINDINGS.get(device)
        if (
            bindings is None
            or latent.dtype == UNSUPPORTED_DTYPES[device]
            or not self._weights.readable(latent)
        ):
            return self.stage_a.decode(latent)
        if self._blocks is None:
            self._blocks = [bind(module, bindings) for module in self._modules()]
            if latent.is_cuda:
                from .kernels.launch import compile_ahead

                compile_ahead(lambda: self._decode(latent))
        batch, _, height, width = latent.shape
        if batch * height * width > MAX_GRAPH_POSITIONS or not can_capture(latent.device):
            return self._decode(latent)
        # A size that does not come again, such as a tile's, is not captured.
        graphed = self._graphs.get_or_create(
            tuple(latent.shape), lambda: Graphed(partial(CapturedForward, self._pool))
        )
        return graphed(self._decode, latent)

    def _modules(self) -> Iterator[nn.Module]:
        """The decoder's, in the order in which they run."""
        for block in (*self.stage_a.up_blocks, self.stage_a.out_block):
            yield from block if isinstance(block, nn.Sequential) else (block,)

    def _decode(self, latent: Tensor) -> Tensor:
        assert self._blocks is not None
        x = latent.contiguous(memory_format=torch.channels_last) * self.stage_a.config.scale_factor
        for block in self._blocks:
            x = block(x)
        return x


class BoundMixingBlock:
    """A MixingResidualBlock. Changes the image in place."""

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

    def positions_in(self, limit: int) -> int:
        """The number of positions whose hidden values take up to `limit` bytes."""
        return max(1, limit // (len(self.expand) * self.expand.element_size()))


class FusedMixingBlock(BoundMixingBlock):
    """With fused kernels, a large image some lines at a time: its hidden values take most of the memory."""

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
        lines = lines_per_part(height, self.positions_in(self.hidden_bytes) // width)
        for image, normal in zip(x, h, strict=True):
            for top in range(0, height, lines):
                part = image[top * width : (top + lines) * width]
                hidden_input = depthwise.depthwise_gate_norm(
                    normal, self.taps, self.taps_bias, gate1, part, self.contract_bias, scale2, shift2,
                    torch.empty_like(part), top, height, width, self.eps,
                )  # fmt: skip
                part.addmm_(self._hidden(hidden_input), self.contract.T)

    def _hidden(self, h: Tensor) -> Tensor:
        """GELU of the MLP's first product.  h: (M, C) -> (M, hidden)"""
        from .kernels import products, vqgan

        m, (n, k) = len(h), self.expand.shape
        config = products.choose("linear_gelu", m, n, k, h.device)
        if config is None:
            return vqgan.gelu(F.linear(h, self.expand, self.expand_bias))
        return products.linear_gelu(h, self.expand, self.expand_bias, h.new_empty(m, n), config)


def lines_per_part(lines: int, limit: int) -> int:
    """Lines of each part, up to `limit`, such that the last has about as many: products of similar sizes."""
    parts = -(-lines // max(limit, 1))
    return -(-lines // parts)


class PointwiseConv:
    """A 1×1 convolution as a product of tokens, which is faster on CUDA."""

    def __init__(self, convolution: Any):
        self.weight, self.bias = convolution.weight.flatten(1), convolution.bias  # (C_out, C_in), (C_out,)

    def __call__(self, image: Tensor) -> Tensor:
        tokens = F.linear(as_tokens(image), self.weight, self.bias)
        return as_image(tokens, (image.shape[-2], image.shape[-1]))


class PlainMixingBlock(BoundMixingBlock):
    """In plain PyTorch, for the CPU, with the gammas folded into the weights of the operations next to them."""

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
        count = self.positions_in(self.hidden_bytes)
        for part, rows in zip(x.flatten(0, 1).split(count), h.flatten(0, 1).split(count), strict=True):
            hidden = torch.ops.aten.gelu_(F.linear(rows, self.expand, self.expand_bias))
            part.add_(self.contract_bias).addmm_(hidden, self.contract.T)


def bind(module: nn.Module, bindings: dict[type[nn.Module], Any]) -> Any:
    """The module bound by its type's binding, or the module itself.  (B, C, H, W) -> (B, C, H, W)"""
    return next((bound(module) for kind, bound in bindings.items() if isinstance(module, kind)), module)


BINDINGS: dict[str, dict[type[nn.Module], Any]] = {
    "cuda": {MixingResidualBlock: FusedMixingBlock, nn.Conv2d: PointwiseConv},
    "cpu": {MixingResidualBlock: PlainMixingBlock},
}
UNSUPPORTED_DTYPES = {"cuda": torch.float32, "cpu": torch.float16}  # left to Stage A itself
