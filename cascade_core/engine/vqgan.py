"""Stage A's decoder over tokens, on CUDA with fused kernels and a CUDA graph for each size of latent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..networks.stage_a import MixingResidualBlock, StageA
from ..placement import RunBytes, WeightConsumer
from . import compilation
from .backend import WAYS
from .blocks import taps_of
from .card import card_of
from .fallback import Fallback, Notify
from .graphs import Graphed, GraphMemory, can_capture
from .layout import as_image, as_tokens, shuffle
from .lru import LRU
from .weights import WeightSnapshot
from .workspace import empty

HIDDEN_BYTES = 2**28  # of hidden values at a time: more than those of 1024 × 1024 pixels at 384 channels
CACHED_BYTES = 2**21  # the same on the CPU, small enough to stay in its cache until they are read again
GRAPHS = 2  # sizes of latent whose graphs are kept
MAX_GRAPH_POSITIONS = 2**18  # of all latents of a batch: 2048 × 2048 pixels


class DecoderEngine(WeightConsumer):
    """`engine(latent)` as `stage_a.decode(latent)`, on CUDA in half precision, on the CPU in bf16 or float32.

    In any other precision, and where a kernel failed, it calls Stage A itself.

    latent: (B, c_latent, h, w) in the weights' precision -> (B, 3, 4h, 4w)
    """

    def __init__(self, stage_a: StageA, notify: Notify | None = None):
        """notify: told once, in a sentence, that a kernel failed and what that costs; by default the log."""
        self.stage_a = stage_a
        self._fallback = Fallback("Stage A", WAYS["exact"], notify)
        self._compilation: compilation.Compilation | None = None
        self.forget()

    def compile_in_background(self, device: torch.device) -> None:
        """Begins to compile the kernels of decoding on a device, before there is anything to decode."""
        self._compilation = compilation.begin(self.stage_a, device)

    def forget(self) -> None:
        """Frees everything derived from the weights, with the graphs' memory."""
        self._graphs: LRU[Graphed] = LRU(GRAPHS)
        self.offload()

    def offload(self) -> None:
        """`forget`, but for what the graphs need, which is the same wherever the weights are."""
        self._weights = WeightSnapshot(self.stage_a)
        self._blocks: list[Any] | None = None
        self._graph_memory = GraphMemory()
        for graphed in self._graphs.values():
            graphed.move_to(self._graph_memory)

    def graph_bytes(self, device: torch.device) -> int:
        """Bytes on the device that the CUDA graphs keep for their intermediate values, if they are not shared."""
        return self._graph_memory.size(device)

    def shared_workspace(self) -> Tensor | None:
        return self._graph_memory.memory if self._graph_memory.is_shared else None

    def known_bytes(self, shape: Sequence[int]) -> RunBytes | None:
        """What decoding latents of this shape is known to take; None where it has not ended in a CUDA graph."""
        graphed = self._graphs.get(tuple(shape))
        workspace = None if graphed is None else graphed.workspace_bytes
        return None if workspace is None else RunBytes(workspace, 0)

    @torch.inference_mode()
    def __call__(self, latent: Tensor) -> Tensor:
        if not self._weights.unchanged():
            if self.placement is not None and self._weights.same_values():  # placement has moved them
                self.offload()
            else:
                self.forget()
        self._graph_memory.shared = None if self.placement is None else self.placement.shared
        kind = _kind(latent.device)
        if kind is None or latent.dtype == UNSUPPORTED_DTYPES[kind] or not self._weights.readable(latent):
            return self.stage_a.decode(latent)
        return self._fallback.run(lambda way: self._forward(way, latent, kind), latent.device)

    def _forward(self, way: str, latent: Tensor, kind: str) -> Tensor:
        if way == "plain":
            if self._blocks is not None:
                self.forget()
            return self.stage_a.decode(latent)
        if self._compilation is not None:
            self._compilation.finish()
            self._compilation = None
        if self._blocks is None:
            self._blocks = [bind(module, BINDINGS[kind]) for module in self._modules()]
            if kind == "cuda":
                from .kernels.launch import compile_ahead

                compile_ahead(lambda: self._decode(latent))
        batch, _, height, width = latent.shape
        if batch * height * width > MAX_GRAPH_POSITIONS or not can_capture(latent.device):
            return self._decode(latent)
        # A size that comes only once, such as a tile's, is not captured.
        graphed = self._graphs.get_or_create(tuple(latent.shape), lambda: Graphed(self._graph_memory))
        return graphed(self._decode, latent)

    def _modules(self) -> Iterator[nn.Module]:
        """The decoder's modules, in the order in which they run."""
        for block in (*self.stage_a.up_blocks, self.stage_a.out_block):
            yield from block if isinstance(block, nn.Sequential) else (block,)

    def _decode(self, latent: Tensor) -> Tensor:
        assert self._blocks is not None
        tokens = latent.permute(0, 2, 3, 1)
        x = torch.mul(tokens, self.stage_a.config.scale_factor, out=empty(tokens.shape, latent)).permute(
            0, 3, 1, 2
        )
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
    """MixingResidualBlock in fused kernels; a large image is done in parts of some lines, to save memory."""

    hidden_bytes = HIDDEN_BYTES

    def __init__(self, block: Any):
        super().__init__(block)
        convolution = block.depthwise[1]
        self.taps, self.taps_bias = taps_of(convolution), convolution.bias

    def run_(self, x: Tensor, size: tuple[int, int]) -> None:
        from .kernels import depthwise, vqgan

        height, width = size
        scale1, shift1, gate1, scale2, shift2, _ = self.gammas
        h = vqgan.norm_modulate(x, scale1, shift1, empty(x.shape, x), self.eps)
        lines = lines_per_part(height, self.positions_in(self.hidden_bytes) // width)
        for image, normal in zip(x, h, strict=True):
            for top in range(0, height, lines):
                part = image[top * width : (top + lines) * width]
                hidden_input = depthwise.depthwise_gate_norm(
                    normal, self.taps, self.taps_bias, gate1, part, self.contract_bias, scale2, shift2,
                    empty(part.shape, part), top, height, width, self.eps,
                )  # fmt: skip
                part.addmm_(self._hidden(hidden_input), self.contract.T)

    def _hidden(self, h: Tensor) -> Tensor:
        """GELU of the MLP's first product.  h: (M, C) -> (M, hidden)"""
        from .kernels import products, vqgan

        m, (n, k) = len(h), self.expand.shape
        config = products.choose("linear_gelu", m, n, k, h.device)
        if config is None:
            return vqgan.gelu(torch.addmm(self.expand_bias, h, self.expand.T, out=empty((m, n), h)))
        return products.linear_gelu(h, self.expand, self.expand_bias, empty((m, n), h), config)


def lines_per_part(lines: int, limit: int) -> int:
    """Lines of each part, up to `limit`, chosen so that all parts, and so their products, have about the same size."""
    parts = -(-lines // max(limit, 1))
    return -(-lines // parts)


class PointwiseConv:
    """A 1×1 convolution as a product of tokens, which is faster on CUDA."""

    def __init__(self, convolution: Any):
        self.weight, self.bias = convolution.weight.flatten(1), convolution.bias  # (C_out, C_in), (C_out,)

    def __call__(self, image: Tensor) -> Tensor:
        tokens = as_tokens(image)
        out = empty((*tokens.shape[:2], len(self.weight)), image)
        torch.addmm(self.bias, tokens.flatten(0, 1), self.weight.T, out=out.flatten(0, 1))
        return as_image(out, (image.shape[-2], image.shape[-1]))


class PixelShuffle:
    """nn.PixelShuffle"""

    def __init__(self, module: nn.PixelShuffle):
        self.side = module.upscale_factor

    def __call__(self, image: Tensor) -> Tensor:
        return shuffle(as_tokens(image), (image.shape[-2], image.shape[-1]), self.side)


class DoublingConv:
    """A transposed convolution of 4 × 4 with a stride of 2 as products: cuDNN allocates, which a graph must not.

    An output position is a weighted sum over 2 × 2 positions of the bordered input; which positions and weights
    depends on whether its line and its column are even. All four cases read the same squares. Some lines at a time,
    since the squares take four times the memory of the input.
    """

    def __init__(self, convolution: nn.ConvTranspose2d):
        if (convolution.kernel_size, convolution.stride, convolution.padding) != ((4, 4), (2, 2), (1, 1)):
            raise ValueError(f"{convolution} does not double an image as Stage A's does.")
        self.bias: Any = convolution.bias
        taps = {0: [3, 1], 1: [2, 0]}  # of the kernel over two input positions, for even and odd output
        # (C_out, 2 · 2 · C) each
        self.weights = {
            (y, x): convolution.weight[:, :, taps[y]][..., taps[x]]
            .permute(1, 2, 3, 0)
            .flatten(1)
            .contiguous()
            for y in taps
            for x in taps
        }

    def __call__(self, image: Tensor) -> Tensor:
        batch, channels, height, width = image.shape
        out = empty((batch, 2 * height, 2 * width, len(self.bias)), image)
        bordered = empty((height + 2, width + 2, channels), image).zero_()
        lines = lines_per_part(height, HIDDEN_BYTES // (width * 4 * channels * image.element_size()))
        for lines_in, lines_out in zip(image.permute(0, 2, 3, 1), out, strict=True):
            bordered[1:-1, 1:-1].copy_(lines_in)
            for top in range(0, height, lines):
                count = min(lines, height - top)
                self._double(bordered[top : top + count + 2], lines_out[2 * top : 2 * (top + count)])
        return out.permute(0, 3, 1, 2)

    def _double(self, bordered: Tensor, out: Tensor) -> None:
        """bordered: (h + 2, w + 2, C) -> out: (2h, 2w, C_out)"""
        height, width, channels = len(bordered) - 2, bordered.shape[1] - 2, bordered.shape[2]
        squares = bordered.unfold(0, 2, 1).unfold(1, 2, 1).permute(0, 1, 3, 4, 2)  # (h + 1, w + 1, 2, 2, C)
        row = width + 1
        # One row more, for the end of the last product.
        rows = empty(((height + 1) * row + 1, 4 * channels), bordered)
        rows[:-1].view(squares.shape).copy_(squares)
        rows[-1].zero_()
        for (y, x), weight in self.weights.items():
            first = y * row + x
            product = empty((height * row, len(self.bias)), bordered)
            torch.addmm(self.bias, rows[first : first + height * row], weight.T, out=product)
            # Without the columns that wrap to the next line.
            out[y::2, x::2].copy_(product.view(height, row, -1)[:, :width])


class PlainMixingBlock(BoundMixingBlock):
    """MixingResidualBlock in plain PyTorch, for the CPU, with the gammas folded into the weights next to them."""

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


def _kind(device: torch.device) -> str | None:
    """Key of BINDINGS; None: Stage A runs itself."""
    if card_of(device) is not None:
        return "cuda"
    return "cpu" if device.type == "cpu" else None


def bind(module: nn.Module, bindings: dict[type[nn.Module], Any]) -> Any:
    """The module bound by its type's binding, or the module itself.  (B, C, H, W) -> (B, C, H, W)"""
    return next((bound(module) for kind, bound in bindings.items() if isinstance(module, kind)), module)


BINDINGS: dict[str, dict[type[nn.Module], Any]] = {
    "cuda": {
        MixingResidualBlock: FusedMixingBlock,
        nn.Conv2d: PointwiseConv,
        nn.ConvTranspose2d: DoublingConv,
        nn.PixelShuffle: PixelShuffle,
    },
    "cpu": {MixingResidualBlock: PlainMixingBlock},
}
UNSUPPORTED_DTYPES = {"cuda": torch.float32, "cpu": torch.float16}  # left to Stage A itself
