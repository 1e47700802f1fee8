"""The engine's forward against the networks' own, in plain PyTorch and through the interpreted kernels."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cascade_nodes.cascade_core import StageB, StageC
from cascade_nodes.cascade_core.adapters import LowRank
from cascade_nodes.cascade_core.adapters.apply import Patch, patched
from cascade_nodes.cascade_core.adapters.changes import Difference
from cascade_nodes.cascade_core.diffusion.guidance import Guider
from cascade_nodes.cascade_core.diffusion.noise import NoiseSource
from cascade_nodes.cascade_core.diffusion.samplers import SAMPLERS
from cascade_nodes.cascade_core.engine import Engine, operations_on
from cascade_nodes.cascade_core.engine import engine as engine_module
from cascade_nodes.cascade_core.engine.card import Card, described
from cascade_nodes.cascade_core.networks.config import StageBConfig, StageCConfig
from cascade_nodes.tests.core.sampling import sample_from

TOLERANCE = 3e-6  # of the largest value, in float32: other orders of summation

STAGE_C = StageCConfig(
    c_cond=32, c_hidden=(64, 64), nhead=(4, 4), blocks=((1, 2), (2, 1)), c_clip_text=24, c_clip_text_pooled=24,
    c_clip_img=24,
)  # fmt: skip
UNUSUAL = StageCConfig(  # orders of blocks that the published networks do not have, levels that halve
    c_cond=32, c_hidden=(32, 64), nhead=(2, 4), blocks=((1, 1), (1, 1)), block_repeat=((2, 1), (1, 2)),
    level_config=("FCAT", "ATTCF"), switch_level=(True,), self_attn=(False, True), t_conds=(),
    c_clip_text=24, c_clip_text_pooled=24, c_clip_img=24,
)  # fmt: skip
STAGE_B = StageBConfig(
    c_cond=32, c_hidden=(16, 32, 64), nhead=(-1, -1, 4), blocks=((1, 1, 2), (2, 1, 1)),
    block_repeat=((1, 1, 1), (2, 2, 2)), level_config=("CT", "CT", "CTA"), dropout=(0, 0, 0),
    self_attn=(True, True, True), c_clip=24,
)  # fmt: skip


@pytest.fixture(params=["pytorch", "kernels"])
def operations(request, monkeypatch):
    """Both sets of operations; kernels run interpreted, on the CPU."""
    if request.param == "kernels":
        from cascade_nodes.cascade_core.engine import cuda

        monkeypatch.setattr(engine_module, "operations_on", lambda device, precision: cuda)


def build(network_class, config, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    network = network_class(config).eval().requires_grad_(False)
    for parameter in network.parameters():
        fan_in = parameter[0].numel() if parameter.ndim in (2, 4) and len(parameter) > 1 else 25
        parameter.normal_(0, fan_in**-0.5)
    return network


def stage_c_inputs(
    config, batch: int = 2, size=(4, 5), tokens: int = 7, images: int = 1
) -> tuple[Tensor, dict]:
    return torch.randn(batch, 16, *size), {
        "clip_text": torch.randn(batch, tokens, config.c_clip_text),
        "clip_text_pooled": torch.randn(batch, 1, config.c_clip_text_pooled),
        "clip_img": torch.randn(batch, images, config.c_clip_img),
    }


def stage_b_inputs(config, batch: int = 2, size=(12, 20)) -> tuple[Tensor, dict]:
    conditions = {"effnet": torch.randn(batch, 16, 3, 5), "clip": torch.randn(batch, 1, config.c_clip)}
    return torch.randn(batch, 4, *size), conditions


def assert_same(network, engine, x, conditions, r: float = 0.7) -> None:
    noise = torch.full((len(x),), r)
    with torch.inference_mode():
        expected = network(x, noise, **conditions)
        computed = engine(x, noise, **conditions)
    assert computed.shape == expected.shape
    assert (computed - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.usefixtures("operations")
@pytest.mark.parametrize("config", [STAGE_C, UNUSUAL])
@pytest.mark.parametrize(("batch", "size", "tokens", "images"), [(2, (4, 5), 7, 1), (1, (2, 2), 1, 2)])
def test_stage_c(config, batch, size, tokens, images):
    network = build(StageC, config)
    assert_same(network, Engine(network), *stage_c_inputs(config, batch, size, tokens, images))


# With the last size a level does not divide the one above.
@pytest.mark.parametrize("size", [(8, 8), (12, 20), (10, 14)])
def test_stage_b(size):
    network = build(StageB, STAGE_B)
    x, conditions = stage_b_inputs(STAGE_B, size=size)
    engine = Engine(network)
    assert_same(network, engine, x, conditions)
    assert_same(network, engine, x, {**conditions, "pixels": torch.randn(2, 3, 8, 8)})


def test_nothing_of_the_last_call_stays():
    """Each call gets something else: latent, prompt, noise, further conditions, ControlNet, size."""
    network = build(StageC, STAGE_C)
    engine = Engine(network)
    x, conditions = stage_c_inputs(STAGE_C)
    other_x, other_conditions = stage_c_inputs(STAGE_C)
    control = [torch.randn(2, 64, 4, 5), None, torch.randn(2, 64, 2, 2)]
    assert_same(network, engine, x, conditions)
    assert_same(network, engine, other_x, conditions, r=0.2)
    assert_same(network, engine, x, other_conditions)
    assert_same(
        network, engine, x, {**other_conditions, "sca": torch.full((2,), 0.3), "crp": torch.full((2,), 0.9)}
    )
    assert_same(network, engine, x, {**other_conditions, "control": control})
    assert_same(
        network, engine, x, {**other_conditions, "control": [torch.randn_like(control[0]), None, control[2]]}
    )
    assert_same(network, engine, x, other_conditions)
    assert_same(network, engine, *stage_c_inputs(STAGE_C, batch=1))
    assert_same(network, engine, x, conditions)
    conditions["clip_text"].mul_(0.5)  # as a host may write into what it gave before
    assert_same(network, engine, x, conditions)


def test_it_follows_the_weights():
    network = build(StageC, STAGE_C)
    engine = Engine(network)
    x, conditions = stage_c_inputs(STAGE_C)
    assert_same(network, engine, x, conditions)
    network.down_blocks[0][0].channelwise[4].weight.mul_(1.5)  # in place
    assert_same(network, engine, x, conditions)
    layer = network.up_blocks[0][2].attention.attn.to_k  # another tensor
    layer.weight = torch.nn.Parameter(torch.randn_like(layer.weight), requires_grad=False)
    assert_same(network, engine, x, conditions)
    for name in ("down_blocks.0.2.attention.attn.to_q", "down_blocks.1.0.channelwise.0"):
        shape = network.get_submodule(name).weight.shape
        change = LowRank(torch.randn(4, shape[1]), torch.randn(shape[0], 4))
        for strength in (1.0, -0.5):
            with patched(network, [Patch("a LoRA", {name: change}, strength)]):
                assert_same(network, engine, x, conditions)
        assert_same(network, engine, x, conditions)
    vectors = {
        name: Difference(0.3 * torch.randn_like(p))
        for name, p in network.named_parameters()
        if not name.endswith(".weight")
    }
    with patched(network, [Patch("biases and norms", vectors)]):
        assert_same(network, engine, x, conditions)
    assert_same(network, engine, x, conditions)


def test_joined_weights_are_the_networks_own():
    network, alone = build(StageC, STAGE_C), build(StageC, STAGE_C)
    engine = Engine(network, join=True)
    attention = network.down_blocks[0][2].attention.attn
    engine_module.BoundUNet(network, join=True)
    start = attention.to_q.weight.data_ptr()
    assert attention.to_k.weight.data_ptr() == start + attention.to_q.weight.nbytes
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), alone.parameters(), strict=True))
    assert_same(alone, engine, *stage_c_inputs(STAGE_C))


def test_weights_made_in_inference_mode_can_be_joined():
    """A host that loads and samples in one such block makes them."""
    with torch.inference_mode():
        network, alone = build(StageC, STAGE_C), build(StageC, STAGE_C)
        engine_module.BoundUNet(network, join=True)
    engine = Engine(network)
    for _ in range(2):
        assert_same(alone, engine, *stage_c_inputs(STAGE_C))


def test_bf16_is_as_near_to_float32_as_the_network_itself():
    network = build(StageB, STAGE_B)
    x, conditions = stage_b_inputs(STAGE_B)
    noise = torch.full((len(x),), 0.7)
    with torch.inference_mode():
        exact = network(x, noise, **conditions)
        network.bfloat16()
        x, conditions = x.bfloat16(), {name: value.bfloat16() for name, value in conditions.items()}
        own_error, error = (
            (model(x, noise, **conditions) - exact).norm() for model in (network, Engine(network))
        )
    assert error <= 1.2 * own_error <= 0.02 * exact.norm()


def test_it_follows_layers_and_methods_that_were_replaced():
    network = build(StageC, STAGE_C)
    engine = Engine(network)
    x, conditions = stage_c_inputs(STAGE_C)
    assert_same(network, engine, x, conditions)
    layer = network.clf[1]
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    assert_same(network, engine, x, conditions)
    assert engine.replaced == "clf.1"
    layer.forward = forward  # as hosts give it back
    assert_same(network, engine, x, conditions)
    assert engine.replaced is None
    network.clf[1] = torch.nn.Sequential(layer, torch.nn.Tanh())
    assert_same(network, engine, x, conditions)
    assert engine.replaced == "clf.1"
    network.clf[1] = layer
    assert_same(network, engine, x, conditions)
    assert engine.replaced is None


def test_what_it_cannot_do_the_network_does():
    network = build(StageC, STAGE_C)
    engine = Engine(network)
    x, conditions = stage_c_inputs(STAGE_C)
    r = torch.tensor([0.2, 0.8])  # another for each image
    with torch.inference_mode():
        assert torch.equal(engine(x, r, **conditions), network(x, r, **conditions))
        same = torch.full((2,), 0.5)
        hook = network.down_blocks[0][0].register_forward_hook(lambda module, args, out: out * 2)
        assert torch.equal(engine(x, same, **conditions), network(x, same, **conditions))
        hook.remove()
        half = {name: value.bfloat16() for name, value in conditions.items()}
        network.bfloat16()
        assert torch.equal(engine(x.bfloat16(), r, **half), network(x.bfloat16(), r, **half))


@pytest.mark.parametrize(
    ("capability", "name"),
    [((9, 0), "cuda"), ((8, 0), "cuda"), ((7, 5), "cublas"), ((7, 0), "cublas"), ((6, 1), "operations")],
)
def test_operations_of_a_card(capability, name):
    with described(Card(capability, "a card", 40)):
        chosen: Any = operations_on(torch.device("meta"))  # a module
    assert chosen.__name__.rpartition(".")[2] == name


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_run_with_guidance(sampler):
    network = build(StageC, STAGE_C)
    x, positive = stage_c_inputs(STAGE_C, batch=1)
    _, negative = stage_c_inputs(STAGE_C, batch=1, tokens=9)  # of another length: two forwards a step
    ends = []
    for model in (network, Engine(network)):
        noise = NoiseSource(1, 1, tuple(x.shape[1:]))
        guider = Guider(model, positive, negative, cfg=3.0)
        ends.append(sample_from(guider, x, steps=4, shift=2.0, sampler=sampler, noise=noise.draw))
    assert (ends[0] - ends[1]).abs().max() <= 1e-5 * ends[0].abs().max()
