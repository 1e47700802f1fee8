"""Cases of the engine's kernels beside the products, at the sizes of Stage C, B and A at 1024 × 1024 and at odd ones.

To add a kernel, add a function that makes a `Case` of a level, and name it in `cases`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cascade_nodes.cascade_core.engine.kernels import (
    attention,
    depthwise,
    modulation,
    resident,
    response,
    vqgan,
)

EPS = 1e-6
Pairs = list[tuple[Tensor, Tensor]]  # computed and expected values


class Level(NamedTuple):
    """A feature map, and its attention block if it has one."""

    name: str
    batch: int
    height: int
    width: int
    channels: int
    heads: int = 0
    cached: int = 0  # conditioning tokens

    @property
    def size(self) -> str:
        return f"{self.name} {self.batch}×{self.height * self.width}×{self.channels}"


STAGES = [
    Level("C", 2, 24, 24, 2048, 32, 85),
    Level("B0", 2, 128, 128, 320),
    Level("B1", 2, 64, 64, 640),
    Level("B2", 2, 32, 32, 1280, 20, 4),
    Level("B3", 2, 16, 16, 1280, 20, 4),
    Level("odd", 3, 19, 23, 200, 25, 7),
]
VQGAN = [Level("A1", 1, 256, 256, 384), Level("A0", 1, 512, 512, 192), Level("odd", 2, 33, 47, 100)]


@dataclass
class Case:
    """One kernel, or several that together compute one operation."""

    kernel: str
    level: Level
    call: Callable[[], Any]  # called many times on the same tensors, whose values may become anything
    check: Callable[[], Pairs]  # once, on new tensors
    traffic: int = 0  # bytes that have to be read and written at least
    operations: int = 0  # floating-point, of products
    rival: Callable[[], Any] | None = None  # the same in PyTorch


class Draw:
    """Draws normal numbers, the same in each run."""

    def __init__(self, device: str, dtype: torch.dtype):
        self.generator, self.device, self.dtype = torch.Generator(device).manual_seed(0), device, dtype

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(*shape, generator=self.generator, device=self.device)
        return values.to(dtype or self.dtype)


def tokens(draw: Draw, level: Level, width: int = 1) -> Tensor:
    return draw(level.batch, level.height * level.width, width * level.channels)


def convolved(x: Tensor, weight: Tensor, bias: Tensor, level: Level, mode: str) -> Tensor:
    """The depthwise convolution of tokens in float32."""
    image = x.float().unflatten(1, (level.height, level.width)).permute(0, 3, 1, 2)
    image = F.pad(image, (1, 1, 1, 1), mode=mode)
    kernel = weight.float().T.reshape(level.channels, 1, 3, 3)
    return F.conv2d(image, kernel, bias.float(), groups=level.channels).permute(0, 2, 3, 1).flatten(1, 2)


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def depthwise_norm(draw: Draw, level: Level, label: str = "", **options: Any) -> Case:
    x, weight, bias = tokens(draw, level), draw(9, level.channels), draw(level.channels)
    out = torch.empty_like(x)

    def call() -> Tensor:
        return depthwise.depthwise_norm(x, weight, bias, level.height, level.width, EPS, out, **options)

    def check() -> Pairs:
        return [(call(), layer_norm(convolved(x, weight, bias, level, "constant")))]

    return Case("depthwise_norm" + label, level, call, check, 2 * x.nbytes)


def norm(draw: Draw, level: Level) -> Case:
    x = tokens(draw, level)
    out = torch.empty_like(x)

    def call() -> Tensor:
        return modulation.norm(x, out, EPS)

    return Case(
        "norm",
        level,
        call,
        lambda: [(call(), layer_norm(x.float()))],
        2 * x.nbytes,
        rival=lambda: layer_norm(x),
    )


def modulate(draw: Draw, level: Level) -> Case:
    x, scale_shift = tokens(draw, level), draw(2 * level.channels, dtype=torch.float32)
    scale, shift = scale_shift.chunk(2)

    def check() -> Pairs:
        return [(modulation.modulate(x.clone(), scale_shift), x.float() * (1 + scale) + shift)]

    return Case("modulate", level, lambda: modulation.modulate(x, scale_shift), check, 2 * x.nbytes)


def modulate_norm(draw: Draw, level: Level) -> Case:
    x, scale_shift = tokens(draw, level), draw(2 * level.channels, dtype=torch.float32)
    bias, out = draw(level.channels, dtype=torch.float32), torch.empty_like(x)
    scale, shift = scale_shift.chunk(2)

    def check() -> Pairs:
        changed, expected = x.clone(), x.float() * (1 + scale) + shift
        modulation.modulate_norm(changed, scale_shift, bias, out, EPS)
        return [(out, layer_norm(expected)), (changed, expected + bias)]

    def call() -> Tensor:
        return modulation.modulate_norm(x, scale_shift, bias, out, EPS)

    return Case("modulate_norm", level, call, check, 3 * x.nbytes)


def response_expected(h: Tensor, gamma: Tensor) -> Tensor:
    h = F.gelu(h.float())
    r = torch.linalg.vector_norm(h, dim=1, keepdim=True)
    return h * (1 + gamma.float() * r / (r.mean(dim=-1, keepdim=True) + response.EPS))


def response_in_three(draw: Draw, level: Level) -> Case:
    h, gamma = tokens(draw, level, 4), draw(4 * level.channels)
    chunks = response.response_chunks(h.shape[1], h.shape[2])
    partial = draw(level.batch, chunks, h.shape[2], dtype=torch.float32)
    scale = torch.empty_like(partial[:, 0])

    def run(h: Tensor) -> Tensor:
        response.gelu_response(h, partial)
        response.response_scale(partial, gamma, scale)
        return response.apply_response(h, scale)

    def check() -> Pairs:
        return [(run(h.clone()), response_expected(h, gamma))]

    return Case("gelu, response norm", level, lambda: run(h), check, 4 * h.nbytes)


def response_scale(draw: Draw, level: Level) -> Case:
    k = 4 * level.channels
    chunks = response.response_chunks(level.height * level.width, k)
    partial, gamma = draw(level.batch, chunks, k, dtype=torch.float32).square(), draw(k)
    scale = torch.empty_like(partial[:, 0])

    def call() -> Tensor:
        return response.response_scale(partial, gamma, scale)

    def check() -> Pairs:
        r = partial.sum(1).sqrt()
        return [(call(), 1 + gamma.float() * r / (r.mean(dim=1, keepdim=True) + response.EPS))]

    return Case("response_scale", level, call, check, partial.nbytes + scale.nbytes)


def response_in_one(draw: Draw, level: Level) -> Case | None:
    h, gamma = tokens(draw, level, 4), draw(4 * level.channels)
    if h.device.type != "cuda" or not resident.fits(h):
        # Its programs wait for each other, which the interpreter cannot do.
        return None
    workspace = resident.response_workspace(level.batch, h.shape[2], h.device)

    def check() -> Pairs:
        pairs = []
        for _ in range(3):  # launch after launch with the same counters
            pairs.append(
                (resident.gelu_response_norm(h.clone(), gamma, workspace), response_expected(h, gamma))
            )
        return pairs

    def call() -> Tensor:
        return resident.gelu_response_norm(h, gamma, workspace)

    return Case("the same in one launch", level, call, check, 2 * h.nbytes)


def attend(draw: Draw, level: Level, label: str = "", **options: Any) -> Case:
    qkv = tokens(draw, level, 3)
    key, value = (draw(level.batch, level.cached, level.channels) for _ in range(2))
    out = torch.empty_like(qkv[..., : level.channels]).contiguous()
    query, self_key, self_value = qkv.chunk(3, dim=-1)
    q, k, v = (
        t.unflatten(-1, (level.heads, -1)).transpose(1, 2).contiguous()
        for t in (query, torch.cat([self_key, key], 1), torch.cat([self_value, value], 1))
    )

    def call() -> Tensor:
        return attention.attention(qkv, key, value, level.heads, out, **options)

    def check() -> Pairs:
        shares = (q.float() @ k.float().mT / q.shape[-1] ** 0.5).softmax(dim=-1)
        return [(call(), (shares @ v.float()).transpose(1, 2).flatten(2))]

    operations = 4 * q.shape[2] * k.shape[2] * level.batch * level.channels
    traffic = qkv.nbytes + out.nbytes + key.nbytes + value.nbytes
    rival = lambda: F.scaled_dot_product_attention(q, k, v)  # noqa: E731
    return Case("attention" + label, level, call, check, traffic, operations, rival)


def norm_modulate(draw: Draw, level: Level) -> Case:
    x, gammas = tokens(draw, level), draw(6)
    out = torch.empty_like(x)

    def call() -> Tensor:
        return vqgan.norm_modulate(x, gammas[0], gammas[1], out)

    def check() -> Pairs:
        scale, shift = gammas.float()[:2]
        return [(call(), layer_norm(x.float()) * (1 + scale) + shift)]

    return Case("norm_modulate", level, call, check, 2 * x.nbytes)


def depthwise_gate_norm(draw: Draw, level: Level, label: str = "", **options: int) -> Case:
    h, x = tokens(draw, level), tokens(draw, level)
    weight, (bias, next_bias) = draw(9, level.channels), draw(2, level.channels)
    gate, scale, shift = draw(6)[2:5]
    out = torch.empty_like(x)

    def run(x: Tensor) -> None:
        for source, image, normal in zip(h, x, out, strict=True):
            depthwise.depthwise_gate_norm(
                source, weight, bias, gate, image, next_bias, scale, shift, normal,
                0, level.height, level.width, EPS, **options,
            )  # fmt: skip

    def check() -> Pairs:
        changed = x.clone()
        run(changed)
        expected = x.float() + gate.float() * convolved(h, weight, bias, level, "replicate")
        normal = layer_norm(expected) * (1 + scale.float()) + shift.float()
        return [(out, normal), (changed, expected + next_bias.float())]

    return Case("depthwise_gate_norm" + label, level, lambda: run(x), check, 4 * x.nbytes)


def gelu(draw: Draw, level: Level) -> Case:
    h = tokens(draw, level, 4)

    def check() -> Pairs:
        return [(vqgan.gelu(h.clone()), F.gelu(h.float()))]

    return Case("gelu", level, lambda: vqgan.gelu(h), check, 2 * h.nbytes, rival=lambda: F.gelu(h))


def cases(draw: Draw, stages: list[Level] = STAGES, vqgan_levels: list[Level] = VQGAN) -> Iterator[Case]:
    """One at a time, so that a case's tensors are freed before the next one's are made."""
    for level in stages:
        for make in (depthwise_norm, norm, modulate, modulate_norm, response_in_three, response_scale):
            yield make(draw, level)
        one = response_in_one(draw, level)
        if one:
            yield one
        if level.heads:
            yield attend(draw, level)
    for level in vqgan_levels:
        for make in (norm_modulate, depthwise_gate_norm, gelu):
            yield make(draw, level)


def sweep(draw: Draw) -> Iterator[Case]:
    """All configurations of the kernels that have several."""
    for level in VQGAN[:2]:
        for elements in (2048, 4096, 8192, 16384):
            for warps in (2, 4, 8, 16):
                label = f" {elements} w{warps}"
                yield depthwise_gate_norm(draw, level, label, elements=elements, num_warps=warps)
    for level in STAGES:
        tile = depthwise.norm_tile(level.channels)
        for rows in (tile.rows // 2, tile.rows, 2 * tile.rows):
            for warps in (2, 4, 8):
                label = f" {rows} w{warps}"
                yield depthwise_norm(draw, level, label, tile=tile._replace(rows=rows, warps=warps))
        if level.heads:
            for m, n, warps in (
                (128, 64, 4),
                (128, 64, 8),
                (128, 128, 8),
                (64, 64, 4),
                (64, 128, 4),
                (128, 128, 4),
            ):
                for stages in (2, 3, 4):
                    label = f" {m}×{n} w{warps} s{stages}"
                    options = {"block_m": m, "block_n": n, "num_warps": warps, "num_stages": stages}
                    yield attend(draw, level, label, **options)
