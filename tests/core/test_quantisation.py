"""8-bit weights: their rounding, networks and files of them, LoRAs on them, and their placement."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cascade_nodes.cascade_core import StageB, StageC
from cascade_nodes.cascade_core.adapters import LowRank
from cascade_nodes.cascade_core.adapters.apply import Patch, changed_weight, patched
from cascade_nodes.cascade_core.checkpoints import first_non_finite, load_model
from cascade_nodes.cascade_core.checkpoints.quantised import quantised_layout
from cascade_nodes.cascade_core.engine import Engine
from cascade_nodes.cascade_core.networks.quantisation import (
    E4M3,
    INT8,
    QuantisedWeight,
    dequantise,
    quantisable,
    quantise,
    quantise_network,
    quantised_layers,
    weight_format,
)
from cascade_nodes.cascade_core.placement import DeviceMemory, Placement
from cascade_nodes.tests.core.placements import Counting, Late
from cascade_nodes.tests.engine.test_engine import STAGE_B, STAGE_C, build, stage_b_inputs, stage_c_inputs
from cascade_nodes.tests.golden_weights import relative_error
from cascade_nodes.tests.nodes.tiny import CONFIGS

FORMATS = pytest.mark.parametrize("dtype", [E4M3, INT8], ids=["e4m3", "int8"])
STAGES = pytest.mark.parametrize(
    ("network_class", "config", "inputs"),
    [(StageC, STAGE_C, stage_c_inputs), (StageB, STAGE_B, stage_b_inputs)],
    ids=["C", "B"],
)
LAYER = "down_blocks.1.0.channelwise.0"


def same(one: Any, other: Any) -> bool:
    """Bits of tensors, also of 8-bit ones."""
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(one, other, strict=True))


def e4m3_grid() -> Tensor:
    values = torch.arange(256, dtype=torch.uint8).view(E4M3).double()
    return values[values.isfinite()].unique()


def lora(seed: int = 0, rank: int = 4) -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(seed)
    up, down = torch.randn(256, rank, generator=generator), torch.randn(rank, 64, generator=generator)
    return {LAYER: LowRank(down, 0.1 * up)}


@torch.inference_mode()
def forward(model: Any, x: Tensor, conditions: dict[str, Tensor]) -> Tensor:
    return model(x, torch.full((len(x),), 0.7), **conditions)


@pytest.mark.parametrize(("dtype", "largest"), [(E4M3, 448.0), (INT8, 127.0)])
def test_each_row_is_rounded_to_the_nearest(dtype, largest):
    weight = torch.randn(40, 60) * torch.logspace(-20, 20, 40)[:, None]
    weight[3] = 0
    weight8, scale = quantise(weight, dtype)
    assert (weight8.dtype, weight8.shape, scale.dtype, scale.shape) == (dtype, (40, 60), torch.float32, (40,))
    assert scale[3] == 1
    peaks = weight.abs().amax(1)
    assert torch.equal(scale[peaks > 0], (peaks / largest)[peaks > 0])
    grid = e4m3_grid() if dtype == E4M3 else torch.arange(-127, 128).double()
    exact = weight.double() / scale.double()[:, None]
    nearest = (exact[..., None] - grid).abs().min(-1).values
    # A quotient in float32 may fall on the other side of a tie.
    assert ((weight8.double() - exact).abs() - nearest).max() <= largest * 2**-23
    assert torch.equal(quantise(dequantise(QuantisedWeight(weight8, scale), torch.float64), dtype).weight8.float(),
                       weight8.float())  # fmt: skip


@pytest.mark.parametrize(("dtype", "least", "most"), [(E4M3, 0.0255, 0.0275), (INT8, 0.0075, 0.009)])
def test_the_error_of_a_product(dtype, least, most):
    weight, x = torch.randn(512, 2048), torch.randn(64, 2048)
    exact, rounded = x @ weight.T, x @ dequantise(quantise(weight, dtype), torch.float32).T
    assert least < (rounded - exact).norm() / exact.norm() < most


@FORMATS
@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantised_once(dtype, wide):
    quantised = quantise(torch.randn(24, 40), dtype)
    exact = quantised.weight8.float() * quantised.scale[:, None]
    assert torch.equal(dequantise(quantised, wide), exact.to(wide))


def test_not_a_number_is_not_lost():
    weight = torch.randn(4, 8)
    weight[1, 2], weight[2, 3] = torch.nan, torch.inf
    for dtype in (E4M3, INT8):
        finite = dequantise(quantise(weight, dtype), torch.float32).isfinite().all(1)
        assert finite.tolist() == [True, False, False, True]


@FORMATS
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_weight_at_fault_is_named(dtype, value):
    network: Any = build(StageC, STAGE_C)
    network.get_submodule(LAYER).weight.data[1, 2] = value
    assert first_non_finite(quantise_network(network, dtype)) == f"{LAYER}.weight"


@FORMATS
@STAGES
def test_a_network_in_8_bits(dtype, network_class, config, inputs):
    """Its own forward and the engine's, which dequantises on the processor, are those of the rounded weights."""
    network, call = build(network_class, config), inputs(config)
    exact, rounded = forward(network, *call), build(network_class, config)
    with torch.no_grad():
        for _, layer in quantisable(rounded):
            layer.weight.copy_(
                dequantise(quantise(layer.weight, dtype), torch.float32).view(layer.weight.shape)
            )
    expected = forward(rounded, *call)
    quantise_network(network, dtype)
    assert weight_format(network) == dtype
    assert torch.equal(forward(network, *call), expected)
    assert torch.equal(forward(Engine(network), *call), forward(Engine(rounded), *call))
    assert 0 < relative_error(expected, exact) < (0.2 if dtype == E4M3 else 0.06)
    assert network.state_dict().keys() == rounded.state_dict().keys()


def test_half_of_the_memory_of_bf16():
    with torch.device("meta"):
        network = StageC.from_config({})
    network.bfloat16()
    before = sum(p.nbytes for p in network.parameters())
    quantise_network(network, INT8)
    after = sum(t.nbytes for t in (*network.parameters(), *network.buffers()))
    assert after < 0.53 * before
    assert after < 3.9e9


@FORMATS
def test_a_lora_is_rounded_with_its_weight(dtype):
    """It is rounded once, from the original in float32; afterwards the bits are the same as before."""
    network: Any = build(StageC, STAGE_C).bfloat16()
    original = network.get_submodule(LAYER).weight.detach().clone()
    layer: Any = quantise_network(network, dtype).get_submodule(LAYER)
    before = layer.quantised
    (change,) = lora().values()
    with patched(network, [Patch("a LoRA", lora(), 0.7)]):
        assert same(layer.quantised, quantise(changed_weight(original, change, 0.7), dtype))
    assert same(layer.quantised, before)


@FORMATS
@pytest.mark.parametrize("share", [0.45, 0.7, 2])
@pytest.mark.parametrize("device", [Counting, Late])
def test_placed_and_streamed(dtype, share, device):
    """Every forward gives the bits of the weights in main memory, with and without a LoRA."""
    network, call = quantise_network(build(StageC, STAGE_C), dtype), stage_c_inputs(STAGE_C)
    patches = [Patch("a LoRA", lora(), 1.0)]
    expected = forward(Engine(network), *call)
    with patched(network, patches):
        expected_with = forward(Engine(network), *call)
    assert not torch.equal(expected, expected_with)
    engine, size = Engine(network), sum(p.nbytes for p in network.parameters())
    pool = DeviceMemory(device(int(size * share)), unit_bytes=40_000)
    for changes, result in [
        ([], expected),
        (patches, expected_with),
        (patches, expected_with),
        ([], expected),
    ]:
        outs = pool.run(
            network, lambda _: [forward(engine, *call) for _ in range(3)], patches=changes, consumer=engine
        )
        assert all(torch.equal(out, result) for out in outs)


@FORMATS
def test_streamed_without_another_original(dtype):
    """Weights that a file holds in 8 bits are their own original, patched or not."""
    network, call = quantise_network(build(StageC, STAGE_C), dtype), stage_c_inputs(STAGE_C)
    for _, layer in quantised_layers(network):
        layer.original = None
    patches, other = [Patch("a LoRA", lora(), 1.0)], [Patch("another", lora(1), 0.5)]
    expected = {}
    for name, changes in (("none", []), ("one", patches), ("other", other)):
        with patched(network, changes):
            expected[name] = forward(Engine(network), *call), changes
    engine, size = Engine(network), sum(p.nbytes for p in network.parameters())
    pool = DeviceMemory(Late(int(size * 0.45)), unit_bytes=40_000)
    for name in ("one", "none", "other", "one", "none"):
        result, changes = expected[name]
        outs = pool.run(
            network, lambda _: [forward(engine, *call) for _ in range(2)], patches=changes, consumer=engine
        )
        assert all(torch.equal(out, result) for out in outs), name


def written(path: Path, network: Any) -> Path:
    tensors = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    for name, layer in quantised_layers(network):
        tensors |= quantised_layout(f"{name}.weight", layer.quantised, layer.weight.shape)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


@FORMATS
@pytest.mark.parametrize("kind", ["stage_c", "stage_b"])
def test_a_file_comes_back_to_the_bit(tmp_path, dtype, kind):
    classes: Any = {"stage_c": StageC, "stage_b": StageB}
    save_file(classes[kind].from_config(CONFIGS[kind]).state_dict(), tmp_path / "float.safetensors")
    network, _, _ = load_model(tmp_path / "float.safetensors", kind, eight_bit=dtype)
    again, _, _ = load_model(written(tmp_path / "x.safetensors", network), kind, eight_bit=dtype)
    for (name, one), (_, other) in zip(quantised_layers(network), quantised_layers(again), strict=True):
        assert same(one.quantised, other.quantised), name
        assert other.original is None
    floats: Any = load_model(tmp_path / "x.safetensors", kind)[0]
    for name, layer in quantised_layers(network):
        weight: Any = floats.get_submodule(name).weight
        assert torch.equal(weight, layer.dequantised(torch.bfloat16))


def test_one_scale_stays_one(tmp_path):
    """ComfyUI's fp8 weights have a single scale."""
    weight8 = torch.randn(8, 16).to(E4M3)
    parts = quantised_layout("a.weight", QuantisedWeight(weight8, torch.full((8,), 0.3)), (8, 16))
    assert parts["a.weight_scale"].shape == ()
    parts = quantised_layout("a.weight", QuantisedWeight(weight8, torch.rand(8)), (8, 16))
    assert parts["a.weight_scale"].shape == (8, 1)
    assert bytes(parts["a.comfy_quant"].tolist()) == b'{"format": "float8_e4m3fn"}'


def test_another_format_is_rounded_from_the_files(tmp_path):
    save_file(StageC.from_config(CONFIGS["stage_c"]).state_dict(), tmp_path / "float.safetensors")
    network, _, _ = load_model(tmp_path / "float.safetensors", "stage_c", eight_bit=INT8)
    other, _, _ = load_model(written(tmp_path / "x.safetensors", network), "stage_c", eight_bit=E4M3)
    for (_, one), (_, layer) in zip(quantised_layers(network), quantised_layers(other), strict=True):
        assert same(layer.quantised, quantise(one.dequantised(torch.float32), E4M3))


def test_a_streamed_lora_is_copied_once(monkeypatch):
    """Once patched weights are known they come with their units, in place of the others.

    A run has room for its keys and values, which stay: so the plan of the next one is the same.
    """
    network, call = quantise_network(build(StageC, STAGE_C), INT8), stage_c_inputs(STAGE_C)
    engine, size = Engine(network), sum(p.nbytes for p in network.parameters())
    run_bytes, written = 100_000, []
    pool = DeviceMemory(Late(int(size * 0.45) + run_bytes), unit_bytes=40_000)
    patched_weight = Placement.patched
    monkeypatch.setattr(
        Placement, "patched", lambda *arguments: written.append(1) or patched_weight(*arguments)
    )
    counts, outs = [], []
    for changes in (patches := [Patch("a LoRA", lora(), 1.0)], patches, [], patches):
        written.clear()
        outs.append(
            pool.run(
                network, lambda _: forward(engine, *call), run_bytes, patches=changes, consumer=engine
            ).clone()
        )
        counts.append(len(written))
        assert engine.cache_bytes(torch.device("cpu")) < run_bytes
    assert counts[0] > 0
    assert counts[1:3] == [0, 0]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[3])
    assert not torch.equal(outs[0], outs[2])
