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
from cascade_nodes.cascade_core.engine.unet import BoundUNet
from cascade_nodes.cascade_core.errors import CascadeError
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


def rounded(rows: Tensor) -> Tensor:
    """Each row to e4m3 over its own scale, and back."""
    return over(rows, rows.abs().amax(dim=-1, keepdim=True) / 448)


def rounded_rows(rows: Tensor) -> Tensor:
    """The same for feature maps, whose scales are powers of two."""
    return over(rows, 2 ** (rows.abs().amax(dim=-1, keepdim=True) / 448).log2().ceil())


def over(rows: Tensor, scale: Tensor) -> Tensor:
    return (rows / scale).to(torch.float8_e4m3fn).float() * scale


class Reference:
    """The same arithmetic in plain PyTorch and float32."""

    def __getattr__(self, name: str):
        return getattr(operations, name)

    def pack(self, weight: Tensor | list[Tensor]) -> Tensor:
        return rounded(weight if isinstance(weight, Tensor) else torch.cat(weight))

    def project(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return operations.project(rounded_rows(x), weight, bias)

    def add_linear_(self, x: Tensor, h: Tensor, weight: Tensor) -> None:
        operations.add_linear_(x, rounded_rows(h), weight)

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

    def pack(self, weight: Tensor | list[Tensor]) -> dict[str, Any]:
        return {"computed": fp8.pack(weight), "expected": self.reference.pack(weight)}

    def __getattr__(self, name: str):
        def run(*arguments):
            def of(which: str) -> list[Any]:
                return [a[which] if isinstance(a, dict) else a for a in arguments]

            def value_of(argument: Any) -> Any:
                return values(argument) if isinstance(argument, fp8.Rows) else argument

            x, *others = map(value_of, of("expected"))
            x = x.clone()  # operations may change it in place
            expected = getattr(self.reference, name)(x, *others)
            computed = getattr(fp8, name)(*of("computed"))
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
    forward(Engine(network, precision="fp8"), *call)
    assert {"project", "add_linear_", "channelwise_", "depthwise_norm", "attention"} <= set(compared.errors)
    assert max(compared.errors.values()) < FLIPS


@STAGES
@pytest.mark.usefixtures("use_operations")
def test_its_error(network_class, config, inputs):
    network, call = build(network_class, config), inputs(config)
    expected = forward(network, *call)
    network.bfloat16()
    engine = Engine(network, precision="fp8")
    in_bf16 = relative_error(forward(network, *call, dtype=torch.bfloat16), expected)
    in_fp8 = relative_error(forward(engine, *call, dtype=torch.bfloat16), expected)
    assert in_bf16 < in_fp8 < OVER_BF16 * in_bf16


@pytest.mark.usefixtures("use_operations")
def test_it_follows_the_weights():
    network, call = build(StageC, STAGE_C), stage_c_inputs(STAGE_C)
    engine = Engine(network, precision="fp8")
    before = forward(engine, *call)
    change = LowRank(torch.randn(4, 64), torch.randn(256, 4))
    with patched(network, [Patch("a LoRA", {"down_blocks.1.0.channelwise.0": change}, 1.0)]):
        with_lora = forward(network, *call)
        assert relative_error(forward(engine, *call), with_lora) < 0.5 * relative_error(before, with_lora)
    assert torch.equal(forward(engine, *call), before)


def test_weights_that_are_not_side_by_side_are_multiplied_one_by_one():
    x, bias = torch.randn(2, 9, 32), torch.randn(48)
    weights = [fp8.pack(torch.randn(16, 32)) for _ in range(3)]
    joined = fp8.QuantisedWeight(*(torch.cat(parts) for parts in zip(*weights, strict=True)))
    assert torch.equal(fp8.project(x, weights, bias), fp8.project(x, joined, bias))


def test_repeats_share_their_weights():
    network, packed = build(StageB, STAGE_B), []

    def pack(weight: Tensor | list[Tensor]) -> fp8.QuantisedWeight:
        packed.append(fp8.pack(weight))
        return packed[-1]

    BoundUNet(network, pack=pack)
    assert 0 < sum(weight8.nbytes for weight8, _ in packed) < Engine(network, precision="fp8").extra_bytes()
    assert Engine(network).extra_bytes() == 0


def test_where_it_cannot_be():
    network, call = build(StageC, STAGE_C), stage_c_inputs(STAGE_C)
    with pytest.raises(CascadeError, match=r"fp8 needs an NVIDIA card .* the processor is not one"):
        forward(Engine(network, precision="fp8"), *call)
    with pytest.raises(CascadeError, match="precision 'int8' is not known; choose exact or fp8"):
        Engine(network, precision="int8")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("capability", "chosen"), [((9, 0), True), ((8, 9), True), ((8, 6), False)])
def test_which_cards_have_it(capability, chosen):
    with described(Card(capability, "NVIDIA GeForce RTX 3060", 28)):
        if chosen:
            assert operations_on(torch.device("meta"), "fp8") is fp8
        else:
            with pytest.raises(CascadeError, match="RTX 3060 is not one; choose another precision"):
                operations_on(torch.device("meta"), "fp8")
