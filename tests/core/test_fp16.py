"""fp16 without overflow: networks built to overflow give what they give in float32."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cascade_nodes.cascade_core import CascadeError, StageB, StageC
from cascade_nodes.cascade_core.adapters import LowRank
from cascade_nodes.cascade_core.adapters.apply import Patch, patched
from cascade_nodes.cascade_core.diffusion.guidance import Guider
from cascade_nodes.cascade_core.networks import activations
from cascade_nodes.cascade_core.networks.fp16 import (
    STREAM_SCALE,
    ScaledResponseNorm,
    divided_bias,
    divided_gelu_,
    scale_residual_stream,
    stream_norms,
    stream_scale,
)
from cascade_nodes.cascade_core.networks.layers import GlobalResponseNorm, ResBlock
from cascade_nodes.cascade_core.networks.unet import UNet
from cascade_nodes.tests.core.live_bytes import LiveBytes
from cascade_nodes.tests.core.overflowing import GROWTH, STAGE_B, STAGE_C, Largest, overflowing
from cascade_nodes.tests.core.sampling import sample_from
from cascade_nodes.tests.golden_weights import relative_error

TRAJECTORY = 2e-2  # of the latent after 20 steps, against float32


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def stage_c() -> StageC:
    network = StageC.from_config(STAGE_C)
    overflowing(network)
    return network


@pytest.fixture(scope="module")
def stage_b() -> StageB:
    network = StageB.from_config(STAGE_B)
    overflowing(network)
    return network


def in_fp16(network: UNet, scale: float) -> Any:
    half = deepcopy(network).half()
    scale_residual_stream(half, scale)
    return half


def prompt(seed: int) -> dict[str, Tensor]:
    return {
        "clip_text": randn(1, 20, 32, seed=seed),
        "clip_text_pooled": randn(1, 1, 32, seed=seed + 1),
        "clip_img": randn(1, 1, 24, seed=seed + 2),
    }


def residuals(network: StageC) -> list[Tensor | None]:
    """Residuals as large as the blocks' own contributions, for every block but the second."""
    count = sum(isinstance(block, ResBlock) for block in network.modules())
    count += 3 * 2  # of the levels that run twice
    return [None if i == 1 else randn(1, 64, 5, 6, seed=i) * GROWTH / 10 for i in range(count)]


def trajectory(network: nn.Module, control: list[Tensor | None] | None = None, steps: int = 20) -> Tensor:
    """DDPM with guidance, two images."""
    positive = {**prompt(1), "control": control}
    generator = torch.Generator().manual_seed(3)

    def noise() -> Tensor:
        return torch.randn(2, 16, 7, 10, generator=generator)

    return sample_from(
        Guider(network, positive, prompt(5), 4.0, 0.7),
        noise(),
        steps=20,
        shift=2.0,
        sampler="ddpm",
        noise=noise,
    )


LAYERS = [
    "channelwise.0",
    "channelwise.4",
    "depthwise",
    "attention.attn.to_q",
    "attention.attn.out_proj",
    "mapper",
]


def lora(network: nn.Module) -> Patch:
    """A LoRA of every kind of layer, each change about a third of the weight, row by row and column by column."""
    changes = {}
    for name, weight in network.named_parameters():
        module = name.removesuffix(".weight")
        if weight.ndim > 1 and any(module.endswith(layer) for layer in LAYERS):
            rows, columns = weight.flatten(1).std(1), weight.std(0)
            down = randn(4, *weight.shape[1:], seed=len(changes)) * columns / 6
            up = randn(len(weight), 4, seed=7) * (rows / rows.square().mean().sqrt())[:, None]
            changes[module] = LowRank(down, up.reshape(*up.shape, *[1] * (weight.ndim - 2)))
    assert {layer for layer in LAYERS for name in changes if name.endswith(layer)} == set(LAYERS)
    return Patch("a LoRA", changes)


def test_the_stream_of_the_test_runs_past_fp16(stage_c):
    with Largest(stage_c) as largest:
        out = trajectory(stage_c)
    assert largest.value > 1e6
    assert out.abs().max() < 1e4


@pytest.mark.parametrize("changed", ["plain", "LoRA", "ControlNet", "both"])
def test_a_trajectory_in_fp16(stage_c, changed):
    control = residuals(stage_c) if changed in ("ControlNet", "both") else None
    patches = [lora(stage_c)] if changed in ("LoRA", "both") else []

    def run(network: nn.Module, steps: int = 20) -> Tensor:
        with patched(network, patches):
            return trajectory(network, control, steps)

    reference = run(stage_c)
    if changed != "plain":
        assert relative_error(reference, trajectory(stage_c)) > 0.1
    assert not run(in_fp16(stage_c, 1), steps=1).isfinite().all()
    held = run(in_fp16(stage_c, STREAM_SCALE))
    assert held.isfinite().all()
    assert relative_error(held, reference) <= TRAJECTORY


@pytest.mark.parametrize("scale", [2.0, 64.0, STREAM_SCALE])
def test_in_float32_it_changes_nothing(stage_c, scale):
    reference = trajectory(stage_c, residuals(stage_c))
    held = deepcopy(stage_c)
    scale_residual_stream(held, scale)
    assert torch.equal(trajectory(held, residuals(stage_c)), reference)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_scaled_forward_is_its_plain_one_at_scale_1(stage_c, stage_b, dtype):
    """fp16.py says each such forward a second time; at scale 1 both are the same operations."""
    inputs: list[tuple[Any, tuple, dict]] = [
        (stage_c, (randn(2, 16, 7, 10), torch.rand(2)), {**prompt(1), "control": residuals(stage_c)}),
        (stage_b, (randn(2, 4, 18, 22), torch.rand(2), randn(2, 16, 3, 3), randn(2, 1, 64)), {}),
    ]
    for network, positional, named in inputs:
        network = deepcopy(network).to(dtype)
        values = [value.to(dtype) for value in positional]
        conditions = {
            name: value.expand(2, -1, -1).to(dtype) if isinstance(value, Tensor) else value
            for name, value in named.items()
        }
        reference = network(*values, **conditions)
        scale_residual_stream(network, 2)
        for module in network.modules():
            if hasattr(module, "stream_scale"):
                module.stream_scale = 1.0
        for norm in stream_norms(network):
            norm.eps *= 4
        assert stream_scale(network) == 1
        assert torch.equal(network(*values, **conditions), reference)


def test_with_the_published_eps_it_is_exact_where_the_stream_is_small():
    """The norms' eps counts there: left as it was, it would be `scale`² times as much."""
    network = overflowing(StageC.from_config(STAGE_C), growth=1e-3)
    for norm in stream_norms(network):
        norm.eps = 1e-2
    reference = trajectory(network)
    scale_residual_stream(network, STREAM_SCALE)
    assert relative_error(trajectory(network), reference) <= 1e-6
    for norm in stream_norms(network):
        norm.eps *= STREAM_SCALE**2
    assert relative_error(trajectory(network), reference) > 0.1


def test_a_network_without_growth_loses_nothing():
    """With the stream held, fp16 is as near to float32 as fp16 as published."""
    network = overflowing(StageC.from_config(STAGE_C), growth=1.0)
    reference = trajectory(network)
    published, held = (relative_error(trajectory(in_fp16(network, s)), reference) for s in (1, STREAM_SCALE))
    assert held <= 1.5 * published


def test_weights_stay_and_it_can_be_undone(stage_c):
    network = deepcopy(stage_c)
    before = {name: (weight, weight.clone()) for name, weight in network.state_dict(keep_vars=True).items()}
    eps = [norm.eps for norm in stream_norms(network)]
    classes = [type(module) for module in network.modules()]
    reference = trajectory(network)
    scale_residual_stream(network, 64)
    scale_residual_stream(network)
    after = network.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(
        after[name] is weight and torch.equal(weight, value) for name, (weight, value) in before.items()
    )
    assert [norm.eps for norm in stream_norms(network)] == [e / STREAM_SCALE**2 for e in eps]
    assert {getattr(module, "stream_scale", STREAM_SCALE) for module in network.modules()} == {STREAM_SCALE}
    scale_residual_stream(network, 1)
    assert [type(module) for module in network.modules()] == classes
    assert not any(hasattr(module, "stream_scale") for module in network.modules())
    assert torch.equal(trajectory(network), reference)


@torch.no_grad()
def test_copies_of_a_scaled_network(stage_c):
    scaled = in_fp16(stage_c, STREAM_SCALE)
    inputs = randn(1, 16, 7, 10).half(), torch.rand(1)
    conditions = {name: value.half() for name, value in prompt(1).items()}
    loaded = StageC.from_config(STAGE_C).half().eval()
    scale_residual_stream(loaded)
    loaded.load_state_dict(scaled.state_dict())
    reference = scaled(*inputs, **conditions)
    assert torch.equal(deepcopy(scaled)(*inputs, **conditions), reference)
    assert torch.equal(loaded(*inputs, **conditions), reference)


def test_every_norm_that_reads_the_stream_is_known(stage_c, stage_b):
    for network in (stage_c, stage_b):
        norms = {name for name, module in network.named_modules() if isinstance(module, nn.LayerNorm)}
        known = set(map(id, stream_norms(network)))
        others = {name for name in norms if id(network.get_submodule(name)) not in known}
        assert others <= {"embedding.2", "clip_norm", "effnet_mapper.3", "pixels_mapper.3"}


@torch.no_grad()
def test_stage_b(stage_b):
    inputs = randn(1, 4, 18, 22), torch.tensor([0.4]), randn(1, 16, 3, 3, seed=1), randn(1, 1, 64, seed=2)
    reference = stage_b(*inputs)
    held = deepcopy(stage_b)
    scale_residual_stream(held)
    assert relative_error(held(*inputs), reference) <= 1e-6
    x, r, *conditions = inputs
    halves = x.half(), r, *(condition.half() for condition in conditions)
    assert not in_fp16(stage_b, 1)(*halves).isfinite().all()
    assert relative_error(in_fp16(stage_b, STREAM_SCALE)(*halves).float(), reference) <= TRAJECTORY


@torch.no_grad()
def test_the_response_is_summed_in_float32():
    """With 64 × 64 positions of 2,000 the response is 128,000."""
    norm = GlobalResponseNorm(8)
    norm.gamma.copy_(randn(1, 1, 1, 8))
    norm.beta.copy_(randn(1, 1, 1, 8, seed=1))
    x = 2000 + randn(1, 64, 64, 8, seed=2)
    assert relative_error(deepcopy(norm).half()(x.half()).float(), norm(x)) <= 2e-3
    scaled_norm = ScaledResponseNorm(8)
    scaled_norm.load_state_dict(norm.state_dict())
    scaled_norm.stream_scale = 64.0
    assert relative_error(scaled_norm(x / 16, 16) * 64, norm(x)) <= 1e-6


def test_gelu_of_a_fraction():
    x = torch.linspace(-9, 9, 901).reshape(1, 17, 53, 1)
    assert relative_error(divided_gelu_(x.clone() / 4, 4) * 4, F.gelu(x)) <= 1e-6
    beyond = divided_gelu_(torch.tensor([[[[-400.0]], [[500.0]]]]).half(), 1024)
    assert beyond.flatten().tolist() == [0, 500]


def test_a_layer_that_bypasses_pytorch_is_refused():
    class Elsewhere(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T + self.bias

    with pytest.raises(CascadeError, match=r"Elsewhere is not computed by PyTorch here.*choose dtype bf16"):
        divided_bias(Elsewhere(4, 4), torch.zeros(1, 4), 2)


def test_memory_of_a_forward(stage_c):
    """The memory that hosts make room for covers it."""
    network = in_fp16(stage_c, STREAM_SCALE)
    tokens = randn(2, 20, 32).half(), randn(2, 1, 32).half(), randn(2, 1, 24).half()
    with torch.inference_mode(), LiveBytes(network) as live:
        network(randn(2, 16, 32, 32).half(), torch.rand(2), *tokens)
    assert live.peak <= 2 * activations.stage_c(network.config, 2, 32, 32, 28)
