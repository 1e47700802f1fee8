"""The matrix products of the three stages at 1024 × 1024, and both ways to compute each: apart and fused."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cascade_nodes.cascade_core.engine.kernels import fp8, products, resident, response, vqgan
from cascade_nodes.cascade_core.engine.kernels.products import Config
from timing import relative_error

BATCH = 2
LEVELS = {  # (positions, channels, residual blocks, attention blocks) of a forward
    "C": (576, 2048, 64, 64),
    "B0": (16384, 320, 6, 0),
    "B1": (4096, 640, 18, 0),
    "B2": (1024, 1280, 112, 112),
    "B3": (256, 1280, 24, 24),
}
STAGE_A = {  # (positions at a time, channels, times a picture)
    "A1": (65536, 384, 12),
    "A0": (131072, 192, 2),
}
CACHE = 100e6  # bytes of weights that a graph's calls go through: more than a card's cache
CALLS, REPLAYS = 16, 5


@dataclass
class Case:
    """One product: x (m, k), w (n, k), `rows` of x an image, `count` times a forward."""

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
        return self.m // BATCH

    @property
    def quantised(self) -> bool:
        return self.op.endswith("_fp8")

    @property
    def function(self) -> str:
        return self.op.removesuffix("_fp8")

    def kernel(self, config: Config) -> tuple:
        """Equal where one compiled kernel serves."""
        return self.op, config, self.rows % config.block_m, self.k % config.block_k


def cases(quantised: bool) -> list[Case]:
    """Every product of a forward of Stage C and one of Stage B, and of Stage A those that kernels of ours fuse."""
    found, suffix = [], "_fp8" if quantised else ""
    contract = "linear_add_fp8" if quantised else "scaled_linear_add"
    for positions, c, residual, attention in LEVELS.values():
        m = BATCH * positions
        found += [
            Case("linear_gelu_response" + suffix, m, 4 * c, c, residual),
            Case(contract, m, c, 4 * c, residual),
        ]
        if attention:
            found += [
                Case("linear" + suffix, m, 3 * c, c, attention),
                Case("linear_add" + suffix, m, c, c, attention),
            ]
    if not quantised:
        found += [Case("linear_gelu", m, 4 * c, c, times) for m, c, times in STAGE_A.values()]
    return found


class Operands:
    """Random tensors of a case, and both ways to compute it with the weights number i."""

    def __init__(self, case: Case, copies: int | None = None, device: str = "cuda"):
        self.case = case
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).mul_(std).to(dtype)

        m, n, k = case.m, case.n, case.k
        self.copies = copies or max(2, min(CALLS, int(CACHE / (n * k * 2))))
        self.x = normal(m, k)
        self.bias = None if case.function == "linear_add" else normal(n)  # the network adds that elsewhere
        self.weights = [normal(n, k, std=k**-0.5) for _ in range(self.copies)]
        self.out, self.spare = normal(m, n), normal(m, n)
        self.scale = 1 + normal(BATCH, k, std=0.01, dtype=torch.float32)
        self.gamma, self.shares = normal(n), self.scale.new_empty(BATCH, n)
        self.quantised: list[tuple[Tensor, Tensor]] = []
        if case.quantised:
            self.quantised = [fp8.quantise_weight(w) for w in self.weights]
            self.x8, self.row_scale = fp8.quantise_rows(self.x)

    def partial(self, chunks: int) -> Tensor:
        return self.scale.new_empty(BATCH, chunks, self.case.n)

    def fused(self, config: Config) -> Callable[[int], Any]:
        case, rows, out = self.case, self.case.rows, self.out
        x, weights, scales = self.x, self.weights, [{}] * self.copies
        if case.quantised:
            x, weights = self.x8, [w8 for w8, _ in self.quantised]
            scales = [{"row_scale": self.row_scale, "column_scale": s} for _, s in self.quantised]
        if case.function == "linear":
            return lambda i: products.linear(x, weights[i], self.bias, out, config, **scales[i])
        if case.function == "linear_add":
            return lambda i: products.linear_add(x, weights[i], self.bias, out, config, **scales[i])
        if case.function == "linear_gelu":
            return lambda i: products.linear_gelu(x, weights[i], self.bias, out, config)
        if case.function == "scaled_linear_add":
            return lambda i: products.scaled_linear_add(x, self.scale, weights[i], None, rows, out, config)
        partial = self.partial(products.response_chunks(rows, config))

        def gelu(i: int) -> None:
            products.linear_gelu_response(x, weights[i], self.bias, rows, out, partial, config, **scales[i])
            response.response_scale(partial, self.gamma, self.shares)

        return gelu

    def product(self, i: int, target: Tensor) -> Tensor:
        """PyTorch's, with the bias, or in its place with what `target` holds."""
        if self.case.quantised:
            w8, s = self.quantised[i]
            return fp8.quantised_linear(self.x8, self.row_scale, w8, s, self.bias, target)
        bias = target if self.bias is None else self.bias
        return torch.addmm(bias, self.x, self.weights[i].T, out=target)

    def apart(self) -> Callable[[int], Any]:
        """PyTorch's product and the kernels around it."""
        case, out, images = self.case, self.out, (BATCH, self.case.rows, -1)

        if case.function == "linear":
            return lambda i: self.product(i, out)
        if case.function == "linear_add" and case.quantised:
            return lambda i: out.add_(self.product(i, self.spare))
        if case.function == "linear_add":
            return lambda i: self.product(i, out)
        if case.function == "linear_gelu":
            return lambda i: vqgan.gelu(self.product(i, out))
        if case.function == "scaled_linear_add":
            x = self.x.clone()

            def scaled(i: int) -> None:
                response.apply_response(x.view(images), self.scale)
                out.addmm_(x, self.weights[i].T)

            return scaled
        partial = self.partial(response.response_chunks(case.rows, case.n))

        def gelu(i: int) -> None:
            response.gelu_response(self.product(i, out).view(images), partial)
            response.response_scale(partial, self.gamma, self.shares)

        return gelu

    def around_resident(self) -> Callable[[int], Any] | None:
        """With the whole norm in one launch between two products: the first with it, the second without a scale."""
        case, out = self.case, self.out
        h = out.view(BATCH, case.rows, -1)
        if case.op == "scaled_linear_add":
            return lambda i: out.addmm_(self.x, self.weights[i].T)
        if case.op != "linear_gelu_response" or not resident.fits(h):
            return None
        workspace = resident.response_workspace(BATCH, case.n, out.device)

        def gelu(i: int) -> None:
            self.product(i, out)
            resident.gelu_response_norm(h, self.gamma, workspace)

        return gelu

    def error(self, call: Callable[[int], Any]) -> float:
        """Of the first weights' result, relative to float32 on the same operands."""
        case = self.case
        start = self.out.normal_().clone()
        call(0)
        x, w = self.x.float(), self.weights[0].float()
        if case.quantised:
            w8, s = self.quantised[0]
            x, w = self.x8.float() * self.row_scale[:, None], w8.float() * s[:, None]
        if case.function == "scaled_linear_add":
            x = (x.view(BATCH, case.rows, -1) * self.scale[:, None]).flatten(0, 1)
            return relative_error(self.out, start + x @ w.T)
        expected = F.linear(x, w, None if self.bias is None else self.bias.float())
        if case.function == "linear_add":
            return relative_error(self.out, start + expected)
        if case.function == "linear":
            return relative_error(self.out, expected)
        h = F.gelu(expected)
        if case.function == "linear_gelu":
            return relative_error(self.out, h)
        r = torch.linalg.vector_norm(h.view(BATCH, case.rows, -1), dim=1)
        share = 1 + self.gamma.float() * r / (r.mean(dim=1, keepdim=True) + response.EPS)
        return max(relative_error(self.out, h), relative_error(self.shares, share))

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
