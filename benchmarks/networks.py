"""Networks with random weights, sizes and random prompts that the benchmarks measure.

Full size is Stage C 3.6 B, Stage B 1.5 B and Stage A as published, in bf16; tiny networks run every line on a
processor.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cascade_nodes.cascade_core import StageA, StageB, StageC
from cascade_nodes.cascade_core.geometry import LATENT_CHANNELS, stage_b_size, stage_c_size
from cascade_nodes.cascade_core.networks.layers import TimestepBlock

CLASSES = {"stage_c": StageC, "stage_b": StageB, "stage_a": StageA}
TITLES = {"stage_c": "Stage C", "stage_b": "Stage B", "stage_a": "Stage A decode"}
GAIN, MODULATION_GAIN, SPREAD = 0.5, 0.1, 0.05


@dataclass(frozen=True)
class Setup:
    """Sizes to measure. The standard picture is `side` × `side`, in `steps` of Stage C and B, with guidance in both."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    configs: dict[str, dict[str, Any]] = field(default_factory=lambda: {kind: {} for kind in CLASSES})
    side: int = 1024
    steps: tuple[int, int] = (20, 10)
    cfg: tuple[float, float] = (4.0, 1.1)
    shift: tuple[float, float] = (2.0, 1.0)
    sides: tuple[int, ...] = (512, 768, 1024, 1536, 2048, 4096)
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    product: int = 8192  # side of the matrices whose product is the ceiling
    copied: int = 2**32  # bytes
    runs: int = 10


def full(device: torch.device) -> Setup:
    return Setup(device)


def tiny(device: torch.device) -> Setup:
    c = {"c_cond": 64, "c_hidden": [64, 64], "nhead": [1, 1], "blocks": [[1, 1], [1, 1]]}
    b = {
        "c_cond": 64,
        "c_hidden": [32, 32, 64, 64],
        "nhead": [-1, -1, 1, 1],
        "blocks": [[1, 1, 1, 1], [1, 1, 1, 1]],
        "block_repeat": [[1, 1, 1, 1], [2, 1, 1, 1]],
    }
    a = {"bottleneck_blocks": 1, "c_hidden": 16, "codebook_size": 16}
    return Setup(
        device,
        configs={"stage_c": c, "stage_b": b, "stage_a": a},
        side=64,
        steps=(2, 2),
        sides=(64, 96),
        batches=(1, 2),
        product=64,
        copied=2**16,
        runs=1,
    )


def random_network(kind: str, setup: Setup, seed: int = 0) -> nn.Module:
    """Network built on the measured device in its dtype, with weights that leave every activation finite."""
    # As when loading weights: parameters made in inference mode would behave differently.
    with torch.inference_mode(False), torch.no_grad():
        before = torch.get_default_dtype()
        torch.set_default_dtype(setup.dtype)
        try:
            with torch.device("meta"):
                network = CLASSES[kind].from_config(setup.configs[kind])
        finally:
            torch.set_default_dtype(before)
        network = network.to_empty(device=setup.device).eval().requires_grad_(False)
        generator = torch.Generator(setup.device).manual_seed(seed)
        modulating = {
            layer
            for block in network.modules()
            if isinstance(block, TimestepBlock)
            for layer in block.children()
        }
        for module in network.modules():
            _fill(module, MODULATION_GAIN if module in modulating else GAIN, generator)
        return network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _fill(module: nn.Module, gain: float, generator: torch.Generator) -> None:
    """Fills a layer's own weights: products get `gain` times their input's deviation, all else is near identity."""
    if isinstance(module, nn.BatchNorm2d):
        module.reset_running_stats()
        return
    for parameter in module.parameters(recurse=False):
        weight = isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) and parameter.dim() > 1
        spread = gain / math.sqrt(_fan_in(module)) if weight else SPREAD
        parameter.normal_(std=spread, generator=generator)


def _fan_in(layer: Any) -> float:
    """Number of products summed in one output value."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    taps = math.prod(layer.kernel_size)
    if isinstance(layer, nn.ConvTranspose2d):
        taps /= math.prod(layer.stride)
    return layer.in_channels // layer.groups * taps


# Inputs


def latent_shape(kind: str, side: int) -> tuple[int, int, int]:
    """(C, H, W) of the latent of one picture of side × side pixels; Stage A decodes Stage B's."""
    if kind == "stage_c":
        return LATENT_CHANNELS[kind], *stage_c_size(side, side)
    return LATENT_CHANNELS["stage_b"], *stage_b_size(side, side)


@dataclass(frozen=True)
class Prompt:
    """Text as the encoder returns it: (1, 77, C) and (1, C)."""

    states: Tensor
    pooled: Tensor


def random_prompts(setup: Setup) -> tuple[Prompt, Prompt]:
    """Positive and negative prompt."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(setup.device, setup.dtype)

    return Prompt(draw(1, 77, 1280), draw(1, 1280)), Prompt(draw(1, 77, 1280), draw(1, 1280))


def conditions(kind: str, prompt: Prompt, latents: Tensor | None = None) -> dict[str, Tensor]:
    """Conditions of Stage C or B for a prompt; `latents` (B, 16, h, w) are Stage C's, for Stage B."""
    pooled = prompt.pooled[:, None]
    if kind == "stage_c":
        image = prompt.pooled.new_zeros(1, 1, 768)
        return {"clip_text": prompt.states, "clip_text_pooled": pooled, "clip_img": image}
    assert latents is not None
    return {"effnet": latents, "clip": pooled}


def forward_inputs(
    kind: str, setup: Setup, rows: int, side: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(x, r, conditions) of a forward with `rows` rows; on the meta device, only their shapes."""
    device, generator = device or setup.device, torch.Generator().manual_seed(2)

    def draw(stage: str) -> Tensor:
        return torch.randn(rows, *latent_shape(stage, side), generator=generator).to(device, setup.dtype)

    x, prior = draw(kind), draw("stage_c")
    prompt, _ = random_prompts(setup)
    values = {
        name: value.to(device).expand(rows, *value.shape[1:])
        for name, value in conditions(kind, prompt, prior).items()
    }
    return x, torch.full((rows,), 0.5, device=device), values
