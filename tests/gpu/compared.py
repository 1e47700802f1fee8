"""Narrow networks of the published layouts, their inputs, and the errors of eager PyTorch and the engine.

Exact is float64, from the same weights and inputs after these were rounded to half precision. An error is relative,
|Δ| / |exact| over all numbers, as in benchmarks/gpu.py; the engine's is compared to that of the network itself.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from cascade_nodes.cascade_core import StageA, StageB, StageC
from cascade_nodes.cascade_core.engine import operations
from cascade_nodes.cascade_core.networks.config import StageAConfig, StageBConfig, StageCConfig

# Depths, repeats and the heads' width of 64 are the published ones. Of the widths, those of the smaller network of each
# stage are not powers of two, as theirs are not.
CLIP: dict[str, Any] = {"c_clip_text": 48, "c_clip_text_pooled": 48, "c_clip_img": 32}
STAGE_C_3_6B = StageCConfig(c_cond=64, c_hidden=(128, 128), nhead=(2, 2), **CLIP)
STAGE_C_1B = StageCConfig(
    c_cond=48, c_hidden=(192, 192), nhead=(3, 3), blocks=((4, 12), (12, 4)), **CLIP
)  # fmt: skip
STAGE_B_1_5B = StageBConfig(c_cond=64, c_hidden=(32, 64, 128, 128), nhead=(-1, -1, 2, 2), c_clip=48)
STAGE_B_700M = StageBConfig(
    c_cond=48, c_hidden=(40, 72, 192, 192), nhead=(-1, -1, 3, 3), blocks=((2, 4, 14, 4), (4, 14, 4, 2)),
    block_repeat=((1, 1, 1, 1), (2, 2, 2, 2)), c_clip=48,
)  # fmt: skip
SHALLOW_C = StageCConfig(c_cond=64, c_hidden=(128, 128), nhead=(2, 2), blocks=((1, 2), (2, 1)), **CLIP)
SHALLOW_B = StageBConfig(
    c_cond=64, c_hidden=(32, 64, 128), nhead=(-1, -1, 2), blocks=((1, 1, 2), (2, 1, 1)),
    block_repeat=((1, 1, 1), (2, 2, 2)), level_config=("CT", "CT", "CTA"), dropout=(0, 0, 0),
    self_attn=(True, True, True), c_clip=48,
)  # fmt: skip
STAGE_A = StageAConfig(c_hidden=96, codebook_size=64)

CLASSES: dict[type, Any] = {StageAConfig: StageA, StageBConfig: StageB, StageCConfig: StageC}
GAIN, MODULATION_GAIN, SPREAD = 0.5, 0.1, 0.1  # such that fp16 holds the deepest network
MODULATING = re.compile(r"\.mapper(_\w+)?\.weight$")  # a TimestepBlock's

LEVELS = (0.98, 0.9, 0.75, 0.6, 0.45, 0.3, 0.15, 0.03)  # of noise
OVER_EAGER = 1.2  # the engine's error in half precision over the network's: of few numbers, a tenth is chance
SENSIBLE = 0.05  # the network's own error: above it, the comparison would mean nothing
FLOAT32 = 1e-5  # the engine's error in float32: the deepest network's is 6e-7, GELU is off by up to 7e-7


def draw(shape: Sequence[int], like: Tensor | None = None, seed: int = 0) -> Tensor:
    """Normal numbers, the same on every machine, on the device and in the precision of `like`."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return drawn if like is None else drawn.to(like)


def network_of(config: Any, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Any:
    """A network in evaluation mode, with random weights that all matter."""
    network = CLASSES[type(config)](config).eval().requires_grad_(False)
    for number, (name, parameter) in enumerate(network.named_parameters()):
        spread = SPREAD
        if parameter.ndim in (2, 4) and len(parameter) > 1:
            gain = MODULATION_GAIN if MODULATING.search(name) else GAIN
            spread = gain / math.sqrt(parameter[0].numel())
        elif name.endswith("gammas"):  # by which Stage A's blocks are scaled, shifted and gated
            spread = GAIN
        parameter.copy_(spread * draw(parameter.shape, seed=1000 * seed + number))
    return network.to(device, dtype)


def inputs(
    config: Any,
    like: nn.Module,
    batch: int = 2,
    size: tuple[int, int] = (9, 11),
    *,
    tokens: int = 77,
    images: int = 1,
    effnet: tuple[int, int] = (3, 5),
    pixels: tuple[int, int] | None = None,
    seed: int = 0,
) -> tuple[Tensor, dict[str, Any]]:
    """(x, conditions) on the device and in the precision of the network `like`."""
    weight = next(like.parameters())

    def some(number: int, *shape: int) -> Tensor:
        return draw((batch, *shape), weight, 100 * seed + number)

    if isinstance(config, StageCConfig):
        return some(1, config.c_in, *size), {
            "clip_text": some(2, tokens, config.c_clip_text),
            "clip_text_pooled": some(3, 1, config.c_clip_text_pooled),
            "clip_img": some(4, images, config.c_clip_img),
        }
    conditions = {"effnet": some(2, config.c_effnet, *effnet), "clip": some(3, 1, config.c_clip)}
    if pixels is not None:
        conditions["pixels"] = some(4, config.c_pixels, *pixels)
    return some(1, config.c_in, *size), conditions


def noise(x: Tensor, level: float) -> Tensor:
    """The noise condition (B,) where x is. From elsewhere its embedding would be: sines of angles up to 10,000."""
    return torch.full((len(x),), level, device=x.device)


class Errors(NamedTuple):
    """Errors relative to exact: of the network in its own precision, and of the engine."""

    eager: float
    engine: float


@torch.inference_mode()
def errors(
    network: Any,
    engine: Any,
    x: Tensor,
    conditions: dict[str, Any],
    levels: Sequence[float] = LEVELS,
    kernel_attention: bool = True,
) -> Errors:
    """Errors of forwards at these noise levels together, each of another latent of x's shape; the engine `alone`."""
    exact = copy.deepcopy(network).double()
    exact_conditions = {name: _doubled(value) for name, value in conditions.items()}
    outputs: list[tuple[Tensor, Tensor, Tensor]] = []
    for number, level in enumerate(levels):
        latent, at = draw(x.shape, x, 7 + number), noise(x, level)
        eager = network(latent, at, **conditions)
        with alone(network, kernel_attention):
            computed = engine(latent, at, **conditions)
        outputs.append((exact(latent.double(), at, **exact_conditions), eager, computed))
    return errors_of(outputs)


def errors_of(outputs: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Errors:
    """Errors of (exact, eager, engine) outputs, over all of them together."""
    for exact, eager, computed in outputs:
        assert exact.dtype == torch.float64
        assert (computed.shape, computed.dtype, computed.device) == (eager.shape, eager.dtype, eager.device)
        assert computed.isfinite().all()
    whole = sum(float(exact.square().sum()) for exact, _, _ in outputs)
    off = [
        sum(float((values[which].double() - values[0]).square().sum()) for values in outputs)
        for which in (1, 2)
    ]
    return Errors(*(math.sqrt(value / whole) for value in off))


def assert_near(
    network: Any,
    engine: Any,
    x: Tensor,
    conditions: dict[str, Any],
    levels: Sequence[float] = LEVELS,
) -> None:
    """Asserts that the engine is as near to exact as the network itself."""
    assert_small(errors(network, engine, x, conditions, levels), x.dtype)


def assert_small(measured: Errors, dtype: torch.dtype, over_eager: float = OVER_EAGER) -> None:
    if dtype == torch.float32:
        assert measured.engine <= FLOAT32, measured
    else:
        assert measured.engine <= over_eager * measured.eager, measured
        assert measured.eager <= SENSIBLE, measured


@contextmanager
def alone(network: nn.Module, kernel_attention: bool = True) -> Iterator[None]:
    """Forbids the network's own forward and (with kernel_attention) PyTorch's attention inside the block."""
    error = AssertionError("The engine was not used.")
    with ExitStack() as stack:
        stack.enter_context(patch.object(network, "forward", side_effect=error))
        if kernel_attention:
            stack.enter_context(patch.object(operations, "attention", side_effect=error))
        yield


@torch.inference_mode()
def runs(model: Callable[..., Tensor], x: Tensor, conditions: dict[str, Any], count: int = 3) -> list[Tensor]:
    """Outputs of equal calls. The engine's first is eager, its second captured and replayed, its third replayed."""
    return [model(x, noise(x, 0.7), **conditions) for _ in range(count)]


def same_bits(values: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(values) == len(others) and all(map(torch.equal, values, others))


def _doubled(value: Any) -> Any:
    """Tensors in float64, but for numbers of each image (B,), of which embeddings are made in float32."""
    if isinstance(value, Tensor):
        return value if value.ndim == 1 else value.double()
    return value if value is None else [_doubled(entry) for entry in value]
