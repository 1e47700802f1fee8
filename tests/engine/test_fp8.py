"""Forwards with products in e4m3: interpreted kernels, and for bf16 PyTorch's own product of fp8, on the CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cascade_nodes.cascade_core import StageB, StageC
from cascade_nodes.cascade_core.adapters import LowRank
from cascade_nodes.cascade_core.adapters.apply import Patch, patched
from cascade_nodes.cascade_core.engine import Engine, fp8, operations, operations_on
from cascade_nodes.cascade_core.engine import engine as engine_module
from cascade_nodes.cascade_core.engine.card import Card, described
from cascade_nodes.cascade_core.networks.quantisation import (
    E4M3,
    QuantisedWeight,
    dequantise,
    quantise,
    quantise_network,
)
from cascade_nodes.tests.engine.test_engine import (
    STAGE_B,
    STAGE_C,
    UNUSUAL,
    build,
    stage_b_inputs,
    stage_c_inputs,
)
from cascade_nodes.tests.golden_weights import relative_error

FLIPS = 1e-3  # relative: a sum's last bit may decide between two neighbours in e4m3, which are 1/16 apart
OVER_BF16 = 10  # times its error: e4m3 has four or five bits less, but only the operands of products are rounded to it
STAGES = pytest.mark.parametrize(
    ("network_class", "config", "inputs"),
    [(StageC, STAGE_C, stage_c_inputs), (StageC, UNUSUAL, stage_c_inputs), (StageB, STAGE_B, stage_b_inputs)],
)


def rounded_rows(rows: Tensor) -> Tensor:
    """Each row to e4m3 over its own scale, a power of two, and back."""
    return over(rows, 2 ** (rows.abs().amax(dim=-1, keepdim=True) / 448).log2().ceil())


def over(rows: Tensor, scale: Tensor) -> Tensor:
    return (rows / scale).to(torch.float8_e4m3fn).float() * scale


class Reference:
    """The same arithmetic in plain PyTorch and float32."""

    def __getattr__(self, name: str):
        return getattr(operations, name)

    def project(self, x: Tensor, weight: QuantisedWeight | list[QuantisedWeight], bias: Tensor) -> Tensor:
        weights = [weight] if isinstance(weight, QuantisedWeight) else weight
        return operations.project(rounded_rows(x), torch.cat([dequantise(w, x.dtype) for w in weights]), bias)

    def add_linear_(self, x: Tensor, h: Tensor, weight: QuantisedWeight) -> None:
        operations.add_linear_(x, rounded_rows(h), dequantise(weight, x.dtype))

    def channelwise_(self, x, h, expand, bias, gamma, contract, h_scale, x_scale) -> None:
        h = torch.nn.functional.gelu(self.project(h, expand, bias) * h_scale)
        r = torch.linalg.vector_norm(h, dim=1, keepdim=True)
        self.add_linear_(x, h * (1 + gamma * r / (r.mean(dim=-1, keepdim=True) + 1e-6)) / x_scale, contract)


def values(rows: fp8.Rows) -> Tensor:
    return rows.rows8.float() * rows.scale.view(*rows.rows8.shape[:2], 1)


def assert_rounded(rows: fp8.Rows, expected: Tensor) -> None:
    """Each value within half a step of e4m3; the scale is a power of two, so it says nothing of larger values."""
    step = rows.scale.view(*rows.rows8.shape[:2], 1)
    error = (values(rows) - expected).abs()
    assert (error <= expected.abs() / 16 + step / 1024 + 1e-5 * expected.abs().max()).all()
    assert torch.equal(step.log2(), step.log2().round())


class Compared:
    """The kernels' operations, each held against the reference's on the same arguments."""

    def __init__(self):
        self.reference, self.errors = Reference(), {}

    compile_ahead = staticmethod(operations.compile_ahead)
    can_capture = staticmethod(operations.can_capture)
    formats = fp8.formats

    def __getattr__(self, name: str):
        def run(*arguments):
            def value_of(argument: Any) -> Any:
                return values(argument) if isinstance(argument, fp8.Rows) else argument

            x, *others = map(value_of, arguments)
            x = x.clone()  # operations may change it in place
            expected = getattr(self.reference, name)(x, *others)
            computed = getattr(fp8, name)(*arguments)
            pairs = [(value_of(arguments[0]), x)]
            if isinstance(computed, fp8.Rows):
                assert_rounded(computed, expected)
            elif expected is not None:
                pairs.append((computed, expected))
            worst = max(relative_error(*pair) for pair in pairs)
            self.errors[name] = max(self.errors.get(name, 0.0), worst)
            return computed

        return run


@pytest.fixture
def use_operations(monkeypatch):
    """Sets what a Engine of precision fp8 computes with; at first the kernels."""

    def use(ops) -> None:
        monkeypatch.setattr(engine_module, "operations_on", lambda device, precision: ops)

    use(fp8)
    return use


@torch.inference_mode()
def forward(model, x: Tensor, conditions: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    conditions = {name: value.to(dtype) for name, value in conditions.items()}
    return model(x.to(dtype), torch.full((len(x),), 0.7), **conditions).float()


@STAGES
def test_each_operation_is_the_arithmetic_it_says(use_operations, network_class, config, inputs):
    network, call = build(network_class, config), inputs(config)
    compared = Compared()
    use_operations(compared)
    forward(Engine(quantise_network(network, E4M3)), *call)
    assert {"project", "add_linear_", "channelwise_", "depthwise_norm", "attention"} <= set(compared.errors)
    assert max(compared.errors.values()) < FLIPS


@STAGES
@pytest.mark.usefixtures("use_operations")
def test_its_error(network_class, config, inputs):
    network, call = build(network_class, config), inputs(config)
    expected = forward(network, *call)
    in_bf16 = relative_error(forward(network.bfloat16(), *call, dtype=torch.bfloat16), expected)
    engine = Engine(quantise_network(network, E4M3))
    in_fp8 = relative_error(forward(engine, *call, dtype=torch.bfloat16), expected)
    assert in_bf16 < in_fp8 < OVER_BF16 * in_bf16


@pytest.mark.usefixtures("use_operations")
def test_it_follows_the_weights():
    network, call = quantise_network(build(StageC, STAGE_C), E4M3), stage_c_inputs(STAGE_C)
    engine = Engine(network)
    before = forward(engine, *call)
    change = LowRank(torch.randn(4, 64), torch.randn(256, 4))
    with patched(network, [Patch("a LoRA", {"down_blocks.1.0.channelwise.0": change}, 1.0)]):
        with_lora = forward(network, *call)
        assert relative_error(forward(engine, *call), with_lora) < 0.5 * relative_error(before, with_lora)
    assert torch.equal(forward(engine, *call), before)


def test_weights_that_are_not_side_by_side_are_multiplied_one_by_one():
    x, bias = torch.randn(2, 9, 32), torch.randn(48)
    weights = [quantise(torch.randn(16, 32), E4M3) for _ in range(3)]
    joined = QuantisedWeight(*(torch.cat(parts) for parts in zip(*weights, strict=True)))
    assert torch.equal(fp8.project(x, weights, bias), fp8.project(x, joined, bias))


@pytest.mark.parametrize(("capability", "chosen"), [((9, 0), True), ((8, 9), True), ((8, 6), False)])
def test_which_cards_have_it(capability, chosen):
    with described(Card(capability, "NVIDIA GeForce RTX 3060", 28)):
        assert (operations_on(torch.device("meta"), "fp8") is fp8) == chosen
