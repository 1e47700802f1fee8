"""The engine on a card, its kernels compiled and its graphs captured, against the networks themselves."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from cascade_nodes.cascade_core.adapters import LowRank
from cascade_nodes.cascade_core.adapters.apply import Patch, patched
from cascade_nodes.cascade_core.diffusion.guidance import Guider
from cascade_nodes.cascade_core.diffusion.noise import NoiseSource
from cascade_nodes.cascade_core.diffusion.samplers import SAMPLERS
from cascade_nodes.cascade_core.engine import Engine, graphs, operations, operations_on
from cascade_nodes.cascade_core.engine import engine as engine_module
from cascade_nodes.cascade_core.networks.quantisation import E4M3, quantise_network
from cascade_nodes.tests.core.sampling import sample_from
from cascade_nodes.tests.engine.test_engine import UNUSUAL
from cascade_nodes.tests.gpu.compared import (
    LEVELS,
    SHALLOW_B,
    SHALLOW_C,
    STAGE_B_1_5B,
    STAGE_B_700M,
    STAGE_C_1B,
    STAGE_C_3_6B,
    alone,
    assert_near,
    assert_small,
    draw,
    errors,
    errors_of,
    inputs,
    network_of,
    runs,
    same_bits,
)
from cascade_nodes.tests.gpu.conftest import Replays

pytestmark = pytest.mark.usefixtures("kernels", "exact_arithmetic")

OVER_BF16 = 10  # as in tests/engine/test_fp8.py; the same arithmetic on the CPU has 2.6 to 6.2
OVER_EAGER_RUN = 1.5  # a run's error over eager's: steps make more of chance than one forward does
RUN_IN_FLOAT32 = 1e-4  # four steps with guidance

dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
strict_and_usual = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(scope="module")
def kernels(device: torch.device, capability: tuple[int, int]) -> ModuleType:
    """The kernels, which the engine has to use on this card."""
    if capability < (8, 0):
        pytest.skip(f"the kernels need compute capability 8.0, and this card has {capability}")
    assert find_spec("triton") is not None, "Triton is not installed, so that the engine has no kernels."
    cuda = import_module("cascade_nodes.cascade_core.engine.cuda")
    assert operations_on(device) is cuda
    return cuda


# Every configuration, at sizes that fill tiles and such that do not


class Forward(NamedTuple):
    config: Any
    batch: int
    size: tuple[int, int]
    input_options: dict[str, Any]
    join: bool = False
    levels: tuple[float, ...] = LEVELS


FORWARDS = {
    # 576 positions: the picture of 1024 × 1024, for which attention has another way
    "3.6B, 24x24": Forward(STAGE_C_3_6B, 1, (24, 24), {}, join=True),
    "3.6B, three of 23x25": Forward(STAGE_C_3_6B, 3, (23, 25), {"tokens": 2 * 77, "images": 3}),
    "1B, two of 5x7": Forward(STAGE_C_1B, 2, (5, 7), {"tokens": 56}, join=True),  # 64 tokens in all: one full block
    # So few numbers that chance shows, in four times as many forwards
    "1B, 1x2": Forward(STAGE_C_1B, 1, (1, 2), {"tokens": 1, "images": 2}, levels=4 * LEVELS),
    "unusual, two of 9x11": Forward(UNUSUAL, 2, (9, 11), {}),
    "1.5B, 64x64": Forward(STAGE_B_1_5B, 1, (64, 64), {"effnet": (6, 6)}, join=True),
    # Levels that do not divide the one above; and with a small picture
    "1.5B, two of 34x50": Forward(STAGE_B_1_5B, 2, (34, 50), {"pixels": (8, 8)}),
    "700M, three of 18x46": Forward(STAGE_B_700M, 3, (18, 46), {"effnet": (2, 3), "pixels": (5, 3)}, join=True),
    "700M, 128x136": Forward(STAGE_B_700M, 1, (128, 136), {"effnet": (12, 12)}),
}  # fmt: skip


@dtypes
@pytest.mark.parametrize("case", FORWARDS.values(), ids=FORWARDS.keys())
def test_a_forward(case: Forward, dtype: torch.dtype, device: torch.device, replays: Replays):
    network = network_of(case.config, dtype, device)
    x, conditions = inputs(case.config, network, case.batch, case.size, **case.input_options)
    engine = Engine(network, join=case.join)
    assert_near(network, engine, x, conditions, case.levels)
    assert replays.count == len(case.levels) - 1


@dtypes
@pytest.mark.parametrize("heads", [8, 4, 1])  # of 16, 32 and 128
def test_widths_of_heads(heads: int, dtype: torch.dtype, device: torch.device):
    config = replace(SHALLOW_C, nhead=(heads, heads))
    network = network_of(config, dtype, device)
    assert_near(network, Engine(network), *inputs(config, network))


# Each way to compute a block's MLP: narrow networks alone take the first two


def three_launches(patches: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    resident = import_module("cascade_nodes.cascade_core.engine.kernels.resident")
    patches.setattr(resident, "fits", lambda h: False)


def fused(schedule: str, tma: bool = False) -> Callable[..., None]:
    """The first product fused with GELU and the sums of the response norm."""

    def use(patches: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
        if tma and capability < (9, 0):
            pytest.skip(f"this card, of compute capability {capability}, has no tensor memory accelerator")
        products = import_module("cascade_nodes.cascade_core.engine.kernels.products")
        config = products.Config(64, 64, 32, warps=4, stages=2, schedule=schedule, tma=tma)
        patches.setattr(products, "choose", lambda *_: config)

    return use


WAYS = {
    "three launches": three_launches,
    "tile": fused("tile"),
    "loop": fused("loop"),
    "tma": fused("tile", tma=True),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_ways_of_the_mlp(
    way: Callable[..., None],
    device: torch.device,
    capability: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
):
    way(monkeypatch, capability)
    network = network_of(SHALLOW_C, torch.bfloat16, device)
    engine = Engine(network)
    sizes = (3, (5, 7)), (2, (9, 11)), (2, (8, 8))  # a tile's rows are of many images, of two, of one
    for batch, size in sizes:
        assert_near(network, engine, *inputs(SHALLOW_C, network, batch, size))


def test_fused_products_in_float32(
    device: torch.device, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    WAYS["loop"](monkeypatch, capability)
    network = network_of(SHALLOW_C, torch.float32, device)
    assert_near(network, Engine(network), *inputs(SHALLOW_C, network))


# fp8


@pytest.fixture
def ada(capability: tuple[int, int]) -> None:
    if capability < (8, 9):
        pytest.skip(f"fp8 needs compute capability 8.9, and this card has {capability}")


FP8 = {
    "3.6B, 24x24": Forward(STAGE_C_3_6B, 1, (24, 24), {}),
    "unusual, two of 9x11": Forward(UNUSUAL, 2, (9, 11), {}),
    # Widths of 40 and 72, which PyTorch's own product of fp8 does not take
    "700M, two of 34x50": Forward(STAGE_B_700M, 2, (34, 50), {"pixels": (8, 8)}),
    "shallow, three of 5x7": Forward(SHALLOW_C, 3, (5, 7), {}),
}


@pytest.mark.usefixtures("ada")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", FP8.values(), ids=FP8.keys())
def test_fp8(case: Forward, dtype: torch.dtype, device: torch.device, replays: Replays):
    network = network_of(case.config, torch.bfloat16, device)
    x, conditions = inputs(case.config, network, case.batch, case.size, **case.input_options)
    in_bf16 = errors(network, Engine(network), x, conditions)
    network.to(dtype)
    before = replays.count
    x, conditions = inputs(case.config, network, case.batch, case.size, **case.input_options)
    in_fp8 = errors(network, Engine(quantise_network(network, E4M3)), x, conditions)
    assert replays.since(before) == len(LEVELS) - 1
    assert in_bf16.eager < in_fp8.engine < OVER_BF16 * in_bf16.eager


@pytest.mark.usefixtures("ada")
def test_fp8_follows_a_lora(device: torch.device):
    network = network_of(SHALLOW_C, torch.bfloat16, device)
    x, conditions = inputs(SHALLOW_C, network)
    engine = Engine(quantise_network(network, E4M3))
    before = runs(engine, x, conditions)
    with patched(network, [Patch("a LoRA", {LORA[0]: low_rank(network, LORA[0])}, 1.0)]):
        (expected,) = runs(network, x, conditions, 1)
        for after, without in zip(runs(engine, x, conditions), before, strict=True):
            assert (after - expected).norm() < 0.5 * (without - expected).norm()
    assert same_bits(runs(engine, x, conditions), before)


# What changes between calls


@strict_and_usual
def test_nothing_of_the_last_call_stays(dtype: torch.dtype, device: torch.device):
    """Each call gets something else, on graphs that were captured with the inputs before."""
    network = network_of(SHALLOW_C, dtype, device)
    engine = Engine(network)
    x, conditions = inputs(SHALLOW_C, network)
    _, other = inputs(SHALLOW_C, network, seed=1)
    numbers = {"sca": torch.full((2,), 0.3, device=device), "crp": torch.full((2,), 0.9, device=device)}
    assert_near(network, engine, x, conditions)
    assert_near(network, engine, x, other)
    assert_near(network, engine, x, {**other, **numbers})
    assert_near(network, engine, x, {**conditions, "clip_img": other["clip_img"]})
    for shapes in (
        inputs(SHALLOW_C, network, tokens=3 * 77),
        inputs(SHALLOW_C, network, images=5),
        inputs(SHALLOW_C, network, batch=1),
        inputs(SHALLOW_C, network, size=(11, 9)),
    ):
        assert_near(network, engine, *shapes)
    assert_near(network, engine, x, conditions)
    conditions["clip_text"].mul_(0.5)  # as a host may write into what it gave before
    assert_near(network, engine, x, conditions)


@strict_and_usual
def test_conditions_of_stage_b_change(dtype: torch.dtype, device: torch.device):
    network = network_of(SHALLOW_B, dtype, device)
    engine = Engine(network)
    x, conditions = inputs(SHALLOW_B, network, 2, (34, 50))
    _, other = inputs(SHALLOW_B, network, 2, (34, 50), pixels=(8, 8), seed=1)
    assert_near(network, engine, x, conditions)
    assert_near(network, engine, x, {**conditions, "effnet": other["effnet"]})
    assert_near(network, engine, x, {**conditions, "clip": other["clip"]})
    assert_near(network, engine, x, other)
    assert_near(network, engine, x, {**other, "pixels": conditions["effnet"][:, :3]})
    assert_near(network, engine, x, {**conditions, "sca": torch.full((2,), 0.2, device=device)})
    assert_near(network, engine, x, conditions)


@strict_and_usual
def test_controlnets_come_change_and_go(dtype: torch.dtype, device: torch.device):
    """Residuals of each block's own size and of others, for some blocks, for all, for more than there are."""
    network = network_of(SHALLOW_C, dtype, device)
    engine = Engine(network)
    x, conditions = inputs(SHALLOW_C, network)
    like = next(network.parameters())
    count = itertools.count(50)

    def residual(height: int = 9, width: int = 11) -> Tensor:
        return draw((2, 128, height, width), like, next(count))

    first = [residual(), None, residual(4, 5)]
    without = runs(engine, x, conditions)
    for control in (
        first,
        [residual(), None, residual(4, 5)],  # the same shapes, on the same graph
        [residual(), None, first[2]],
        [None, residual(1, 1)],
        [residual() for _ in range(9)],  # there are six blocks
        [],
        first,
    ):
        assert_near(network, engine, x, {**conditions, "control": control})
    assert_near(network, engine, x, {**conditions, "control": None})
    # It is the graph of before, of which the first of these calls is not the first.
    assert same_bits(runs(engine, x, conditions), 3 * [without[-1]])


def test_a_residual_may_be_written_to(device: torch.device):
    """A caller may write to it between calls, as to conditions."""
    network = network_of(SHALLOW_C, torch.float32, device)
    engine = Engine(network)
    x, conditions = inputs(SHALLOW_C, network)
    residual = draw((2, 128, 9, 11), x, 50)
    for _ in range(3):
        assert_near(network, engine, x, {**conditions, "control": [residual]})
        residual.mul_(-2)


# Of layers with each kind of value that the engine keeps: a convolution's taps, the bias left by a product, scales and
# shifts, joined weights, keys and values, the conditioning; and the first layer and the last
LORA = [
    "down_blocks.1.0.channelwise.0",
    "down_blocks.0.0.depthwise",
    "down_blocks.0.0.channelwise.4",
    "down_blocks.0.1.mapper",
    "down_blocks.0.2.attention.attn.to_q",
    "up_blocks.0.2.kv_mapper.1",
    "up_blocks.1.2.attention.attn.to_v",
    "clip_txt_mapper",
    "embedding.1",
    "clf.1",
]


def low_rank(network: Any, name: str) -> LowRank:
    """A change as large as the weight itself."""
    weight = network.get_submodule(name).weight
    rank, inner = 4, weight.shape[1:]
    down = draw((rank, *inner), seed=11) * weight[0].numel() ** -0.5
    up = draw((len(weight), rank, *[1] * (weight.ndim - 2)), seed=12) * rank**-0.5
    return LowRank(down.to(weight.device), up.to(weight.device))


@strict_and_usual
@pytest.mark.parametrize("join", [False, True], ids=["apart", "joined"])
def test_loras_come_change_and_go(join: bool, dtype: torch.dtype, device: torch.device):
    network = network_of(SHALLOW_C, dtype, device)
    engine = Engine(network, join=join)
    x, conditions = inputs(SHALLOW_C, network)
    before = runs(engine, x, conditions)
    patches = [
        Patch(name, {name: low_rank(network, name)}, strength) for name in LORA for strength in (1, -0.5)
    ]
    sets = [*([patch] for patch in patches), patches[:4], patches[::2]]
    for several in sets:
        with patched(network, several):
            assert_near(network, engine, x, conditions)
            (with_lora,) = runs(engine, x, conditions, 1)
            assert not torch.equal(with_lora, before[-1])
    assert same_bits(runs(engine, x, conditions), before)


def test_a_lora_of_stage_b(device: torch.device):
    """It changes layers in levels that repeat."""
    network = network_of(SHALLOW_B, torch.bfloat16, device)
    engine = Engine(network, join=True)
    x, conditions = inputs(SHALLOW_B, network, 2, (34, 50))
    before = runs(engine, x, conditions)
    names = [
        "up_blocks.0.2.attention.attn.to_k",
        "up_repeat_mappers.1.0",
        "effnet_mapper.0",
        "pixels_mapper.2",
    ]
    changes = {name: low_rank(network, name) for name in names}
    for strength in (1.0, -1.0):
        with patched(network, [Patch("a LoRA", changes, strength)]):
            assert_near(network, engine, x, conditions)
    assert same_bits(runs(engine, x, conditions), before)


@strict_and_usual
def test_it_follows_the_weights(dtype: torch.dtype, device: torch.device):
    network = network_of(SHALLOW_C, dtype, device)
    engine = Engine(network, join=True)
    x, conditions = inputs(SHALLOW_C, network)
    before = runs(engine, x, conditions)
    weight = network.down_blocks[0][0].channelwise[4].weight
    values = weight.clone()
    weight.mul_(1.5)  # in place
    assert_near(network, engine, x, conditions)
    weight.copy_(values)
    assert same_bits(runs(engine, x, conditions), before)
    layer = network.up_blocks[0][2].attention.attn.to_k
    weight = layer.weight
    layer.weight = torch.nn.Parameter(-weight, requires_grad=False)  # another tensor
    assert_near(network, engine, x, conditions)
    layer.weight = weight
    network.cpu().to(device)
    assert same_bits(runs(engine, x, conditions), before)
    engine.forget()
    assert same_bits(runs(engine, x, conditions), before)


def test_it_follows_the_network_to_the_processor_and_back(device: torch.device):
    """The shape stays the same, for which it has a graph on the card."""
    network = network_of(SHALLOW_C, torch.float32, device)
    engine = Engine(network)
    x, conditions = inputs(SHALLOW_C, network)
    before = runs(engine, x, conditions)
    network.cpu()
    there = {name: value.cpu() for name, value in conditions.items()}
    for computed, expected in zip(runs(engine, x.cpu(), there), runs(network, x.cpu(), there), strict=True):
        torch.testing.assert_close(computed, expected, rtol=1e-4, atol=1e-5)
    network.to(device)
    assert same_bits(runs(engine, x, conditions), before)


def test_the_network_is_left_as_it_is(device: torch.device):
    """Who switches the engine off gets what there was before it."""
    network, untouched = (network_of(SHALLOW_C, torch.bfloat16, device) for _ in range(2))
    x, conditions = inputs(SHALLOW_C, network)
    before = runs(network, x, conditions, 1)
    engine = Engine(network, join=True)
    runs(engine, x, conditions)
    assert all(itertools.starmap(torch.equal, zip(network.parameters(), untouched.parameters(), strict=True)))
    assert same_bits(runs(network, x, conditions, 1), before)


# Runs


class OnDevice:
    """A network that is told the noise condition where it is, as `noise` in compared.py says why."""

    def __init__(self, network: Any):
        self.network = network

    def parameters(self) -> Any:
        return self.network.parameters()

    def __call__(self, x: Tensor, r: Tensor, **conditions: Any) -> Tensor:
        return self.network(x, r.to(x.device), **conditions)


def run(model: Any, start: Tensor, prompts: tuple[dict, dict], sampler: str, cfg: float) -> Tensor:
    positive, negative = prompts
    source = NoiseSource(1, len(start), tuple(start.shape[1:]))
    guider = Guider(model, positive, negative, cfg=cfg)
    return sample_from(guider, start, steps=4, shift=2.0, sampler=sampler, noise=source.draw)


def assert_a_run_is_near(
    network: Any, shape: tuple[int, ...], prompts: tuple[dict, dict], sampler: str, cfg: float
) -> None:
    """Also where all forwards are replayed, which then gives the same bits each time."""
    weight = next(network.parameters())
    start = draw(shape, seed=3).to(weight.device)
    exact = OnDevice(copy.deepcopy(network).double())
    expected = run(exact, start.double(), prompts, sampler, cfg)
    eager = run(OnDevice(network), start, prompts, sampler, cfg)
    engine = Engine(network)
    with alone(network):
        first, second, third = (run(engine, start, prompts, sampler, cfg) for _ in range(3))
    assert torch.equal(second, third)
    for latent in (first, second):
        measured = errors_of([(expected, eager, latent)])
        if weight.dtype == torch.float32:
            assert measured.engine <= RUN_IN_FLOAT32
        else:
            assert_small(measured, weight.dtype, OVER_EAGER_RUN)


@strict_and_usual
@pytest.mark.parametrize("texts", [(77, 77), (77, 154)], ids=["one batch", "two forwards a step"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_run_with_guidance(sampler: str, texts: tuple[int, int], dtype: torch.dtype, device: torch.device):
    network = network_of(SHALLOW_C, dtype, device)
    _, positive = inputs(SHALLOW_C, network, tokens=texts[0])
    _, negative = inputs(SHALLOW_C, network, tokens=texts[1], seed=1)
    assert_a_run_is_near(network, (2, 16, 9, 11), (positive, negative), sampler, 4.0)


@strict_and_usual
def test_a_run_of_stage_b(dtype: torch.dtype, device: torch.device):
    network = network_of(SHALLOW_B, dtype, device)
    (_, positive), (_, negative) = (inputs(SHALLOW_B, network, batch=1, seed=seed) for seed in range(2))
    assert_a_run_is_near(network, (1, 4, 34, 50), (positive, negative), "ddpm", 1.1)


# Graphs


def test_a_call_again_gives_the_same_bits(device: torch.device, replays: Replays):
    network = network_of(SHALLOW_C, torch.bfloat16, device)
    engine = Engine(network)
    x, conditions = inputs(SHALLOW_C, network)
    first, *others = runs(engine, x, conditions, 6)
    assert replays.count == 5
    assert same_bits(others, 5 * others[:1])
    assert (first - others[0]).norm() <= 0.02 * first.norm()  # two ways to run the same kernels
    elsewhere = {name: value.clone() for name, value in conditions.items()}
    assert same_bits(runs(engine, x.clone(), elsewhere), 3 * others[:1])
    channels_last = x.to(memory_format=torch.channels_last)
    assert same_bits(runs(engine, channels_last, conditions), 3 * others[:1])
    assert replays.count == 11


def test_a_result_outlives_the_next_call(device: torch.device):
    network = network_of(SHALLOW_C, torch.bfloat16, device)
    engine = Engine(network)
    x, conditions = inputs(SHALLOW_C, network)
    *_, result = runs(engine, x, conditions)
    copy_of_result = result.clone()
    runs(engine, -x, conditions)
    assert torch.equal(result, copy_of_result)


def test_shapes_take_turns(device: torch.device, replays: Replays):
    """There are more than are kept, so that graphs are dropped and captured anew in the memory of others."""
    network = network_of(SHALLOW_C, torch.bfloat16, device)
    engine = Engine(network)
    sizes = [(1, (9, 11)), (2, (9, 11)), (1, (5, 7)), (3, (5, 7)), (1, (16, 16)), (2, (2, 1))]
    assert len(sizes) > engine_module.SHAPES
    calls = [inputs(SHALLOW_C, network, batch, size) for batch, size in sizes]
    results = [runs(engine, *call)[-1] for call in calls]
    few = list(zip(calls, results, strict=True))[-3:]
    before = replays.count
    for _ in range(3):
        for call, expected in few:
            assert same_bits(runs(engine, *call, 1), [expected])
    assert replays.since(before) == 9
    for call, expected in zip(calls, results, strict=True):
        assert same_bits(runs(engine, *call)[1:], 2 * [expected])
        assert_near(network, engine, *call, 4 * LEVELS)


def test_without_graphs(device: torch.device, replays: Replays):
    """A host may ask for none."""
    network = network_of(SHALLOW_C, torch.bfloat16, device)
    engine = Engine(network)
    engine.graphs = False
    x, conditions = inputs(SHALLOW_C, network)
    assert_near(network, engine, x, conditions)
    first, *others = runs(engine, x, conditions)
    assert same_bits(others, [first, first])
    assert replays.count == 0


def test_without_memory_for_a_graph(device: torch.device, replays: Replays, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(graphs.CapturedForward, "__init__", fail)
    network = network_of(SHALLOW_C, torch.bfloat16, device)
    assert_near(network, Engine(network), *inputs(SHALLOW_C, network))
    assert replays.count == 0


# What the network does itself


def test_what_it_cannot_do_the_network_does(device: torch.device, replays: Replays):
    network = network_of(SHALLOW_C, torch.bfloat16, device)
    engine = Engine(network)
    x, conditions = inputs(SHALLOW_C, network)
    with torch.inference_mode():
        two = torch.tensor([0.2, 0.8], device=device)  # another noise condition for each image
        assert torch.equal(engine(x, two, **conditions), network(x, two, **conditions))
    hook = network.down_blocks[0][0].register_forward_hook(lambda module, args, out: out * 2)
    assert same_bits(runs(engine, x, conditions), runs(network, x, conditions))
    hook.remove()
    assert replays.count == 0
    assert_near(network, engine, x, conditions)  # and from now on the engine again


def test_another_convolution_is_the_networks(device: torch.device, replays: Replays):
    config = replace(SHALLOW_C, kernel_size=5)
    network = network_of(config, torch.bfloat16, device)
    x, conditions = inputs(config, network)
    assert same_bits(runs(Engine(network), x, conditions), runs(network, x, conditions))
    assert replays.count == 0


def test_heads_that_the_kernel_does_not_know(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    """With heads of a width of 24 attention is PyTorch's, the rest still the engine's."""
    config = replace(SHALLOW_C, c_hidden=(96, 96), nhead=(4, 4))
    network = network_of(config, torch.bfloat16, device)
    x, conditions = inputs(config, network)
    asked = Mock(side_effect=operations.attention)
    monkeypatch.setattr(operations, "attention", asked)
    assert_small(errors(network, Engine(network), x, conditions, kernel_attention=False), x.dtype)
    assert asked.called
