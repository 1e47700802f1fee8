"""The matrix products with fused kernels at 1024 × 1024, and every way to compute each of them."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cascade_nodes.cascade_core.engine.kernels import products, resident, response, vqgan
from cascade_nodes.cascade_core.engine.kernels.products import Config
from timing import relative_error

BATCH = 2
LEVELS = {  # (positions, channels, residual blocks) of a forward
    "C": (576, 2048, 64),
    "B0": (16384, 320, 6),
    "B1": (4096, 640, 18),
    "B2": (1024, 1280, 112),
    "B3": (256, 1280, 24),
}
STAGE_A = {  # (positions at a time, channels, products per picture)
    "A1": (65536, 384, 12),
    "A0": (131072, 192, 2),
}
CACHE = 100e6  # bytes of weights that a graph's calls cycle through, more than a card's L2 cache
CALLS, REPLAYS = 16, 5


@dataclass
class Case:
    """One product: x (m, k), w (n, k), computed `count` times in a forward."""

    op: str
    m: int
    n: int
    k: int
    count: int

    @property
    def size(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"

    @property
    def rows(self) -> int:
        """Rows of x per image."""
        return self.m // BATCH

    def kernel(self, config: Config) -> tuple:
        """Key of the compiled kernel; equal for products that can share one."""
        return self.op, config, self.rows % config.block_m, self.k % config.block_k


def cases() -> list[Case]:
    """The products with fused kernels in forwards of Stage C, Stage B and Stage A."""
    response = [
        Case("linear_gelu_response", BATCH * positions, 4 * c, c, count)
        for positions, c, count in LEVELS.values()
    ]
    gelu = [Case("linear_gelu", m, 4 * c, c, count) for m, c, count in STAGE_A.values()]
    return [*response, *gelu]


class Operands:
    """Random tensors of a case; each way of computing it takes the index of the weights to use."""

    def __init__(self, case: Case, copies: int | None = None, device: str = "cuda"):
        self.case = case
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).mul_(std).to(torch.bfloat16)

        m, n, k = case.m, case.n, case.k
        self.copies = copies or max(2, min(CALLS, int(CACHE / (n * k * 2))))
        self.x, self.bias, self.gamma, self.out = normal(m, k), normal(n), normal(n), normal(m, n)
        self.weights = [normal(n, k, std=k**-0.5) for _ in range(self.copies)]
        self.images = self.out.view(BATCH, case.rows, n)
        self.scale = self.out.new_empty(BATCH, n, dtype=torch.float32)

    def fused(self, config: Config) -> Callable[[int], Any]:
        """One kernel for the product and GELU, with the sums that the response norm needs."""
        x, weights, bias, out = self.x, self.weights, self.bias, self.out
        if self.case.op == "linear_gelu":
            return lambda i: products.linear_gelu(x, weights[i], bias, out, config)
        partial = self._partial(products.response_chunks(self.case.rows, config))

        def call(i: int) -> None:
            products.linear_gelu_response(x, weights[i], bias, self.case.rows, out, partial, config)
            self._normalise(partial)

        return call

    def separate(self) -> Callable[[int], Any]:
        """PyTorch's product, followed by separate kernels."""
        if self.case.op == "linear_gelu":
            return lambda i: vqgan.gelu(self._product(i))
        partial = self._partial(response.response_chunks(self.case.rows, self.case.n))

        def call(i: int) -> None:
            self._product(i)
            response.gelu_response(self.images, partial)
            self._normalise(partial)

        return call

    def single_launch(self) -> Callable[[int], Any] | None:
        """PyTorch's product, followed by GELU and response norm in one launch; None where it does not fit."""
        if self.case.op == "linear_gelu" or not resident.fits(self.images):
            return None
        workspace = resident.response_workspace(BATCH, self.case.n, self.out.device)

        def call(i: int) -> None:
            self._product(i)
            resident.gelu_response_norm(self.images, self.gamma, workspace)

        return call

    def _partial(self, chunks: int) -> Tensor:
        return self.scale.new_empty(BATCH, chunks, self.case.n)

    def _product(self, i: int) -> Tensor:
        return torch.addmm(self.bias, self.x, self.weights[i].T, out=self.out)

    def _normalise(self, partial: Tensor) -> None:
        response.response_scale(partial, self.gamma, self.scale)
        response.apply_response(self.images, self.scale)

    def error(self, call: Callable[[int], Any]) -> float:
        """Error relative to float32 on the same operands, with the first weights."""
        call(0)
        h = F.gelu(F.linear(self.x.float(), self.weights[0].float(), self.bias.float()))
        if self.case.op == "linear_gelu_response":
            h = h.view_as(self.images)
            r = torch.linalg.vector_norm(h, dim=1, keepdim=True)
            h = h * (1 + self.gamma.float() * r / (r.mean(dim=2, keepdim=True) + response.EPS))
        return relative_error(self.out.view_as(h), h)

    def microseconds(self, call: Callable[[int], Any]) -> float:
        call(0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(CALLS):
                call(i % self.copies)
        graph.replay()
        times = []
        for _ in range(REPLAYS):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            graph.replay()
            after.record()
            after.synchronize()
            times.append(1000 * before.elapsed_time(after) / CALLS)
        return statistics.median(times)
