"""Matrix products, fused and quantised: against PyTorch, for every schedule, at sizes that fill no tile."""

import json

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cascade_nodes.cascade_core.engine.kernels import fp8, products, response
from cascade_nodes.cascade_core.engine.kernels.tuned import PORTABLE, TABLE, Config, nearest
from cascade_nodes.cascade_core.networks.quantisation import E4M3, INT8, quantise

ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # half a step, relative
SIZES = [(2, 36, 40, 24), (2, 96, 72, 80), (3, 64, 48, 56)]  # images, rows of each, K, out
CONFIGS = {
    "portable": None,
    "tile": Config(32, 64, 32, group=2),
    "tile, descriptors": Config(64, 32, 16, group=1, tma=True),
    "loop": Config(64, 32, 32, schedule="loop", tma=True),
    "loop, no descriptors": Config(32, 32, 16, schedule="loop", per_sm=2),
    "tall, descriptors": Config(128, 32, 16, tma=True),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(size: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, w, bias."""
    images, rows, k, n = size
    x, w = normal(images * rows, k, dtype=dtype), normal(n, k, dtype=dtype, seed=1)
    return x, w / k**0.5, normal(n, dtype=dtype, seed=2)


def assert_near(value: Tensor, expected: Tensor, rounding: float) -> None:
    """Within two roundings of each value, and of what sums of that size lose in float32."""
    torch.testing.assert_close(
        value.double(), expected, rtol=2 * rounding, atol=2e-6 * float(expected.abs().max())
    )


@configs
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_linear(config, dtype):
    x, w, bias = operands((2, 36, 72, 80), dtype)
    expected = F.linear(x.double(), w.double(), bias.double())
    assert_near(products.linear(x, w, bias, x.new_empty(72, 80), config), expected, ROUNDING[dtype])
    expected = F.linear(x.double(), w.double())
    assert_near(products.linear(x, w, None, x.new_empty(72, 80), config), expected, ROUNDING[dtype])


@configs
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_linear_gelu(config, dtype):
    x, w, bias = operands((2, 36, 72, 80), dtype)
    expected = F.gelu(F.linear(x.double(), w.double(), bias.double()))
    assert_near(products.linear_gelu(x, w, bias, x.new_empty(72, 80), config), expected, ROUNDING[dtype])


@configs
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_linear_gelu_response(config, size):
    images, rows, _, n = size
    x, w, bias = operands(size, torch.float32)
    out, chunks = x.new_empty(images * rows, n), products.response_chunks(rows, config)
    partial = x.new_full((images, chunks, n), float("nan"))
    products.linear_gelu_response(x, w, bias, rows, out, partial, config)
    assert_near(out, F.gelu(F.linear(x.double(), w.double(), bias.double())), 3e-6)
    squares = out.double().view(images, rows, n).square()
    assert_near(partial.sum(1), squares.sum(1), 1e-6)
    chunk = products._chunk(rows, config or PORTABLE)
    assert_near(partial[:, 0], squares[:, :chunk].sum(1), 1e-6)


def test_response_of_a_fused_product_is_that_of_the_block():
    """Both products and the response norm between them, as a residual block's MLP computes it."""
    images, rows, c = 2, 72, 40
    x, expand, bias = operands((images, rows, c, 4 * c), torch.float32)
    contract, gamma, config = normal(c, 4 * c, seed=4), normal(4 * c, seed=5), Config(64, 32, 32)
    h = F.gelu(F.linear(x, expand, bias)).view(images, rows, -1)
    r = torch.linalg.vector_norm(h, dim=1, keepdim=True)
    h = h * (1 + gamma * r / (r.mean(dim=-1, keepdim=True) + 1e-6))
    expected = x + h.flatten(0, 1) @ contract.T

    partial = x.new_empty(images, products.response_chunks(rows, config), 4 * c)
    out, scale = x.new_empty(images * rows, 4 * c), x.new_empty(images, 4 * c)
    products.linear_gelu_response(x, expand, bias, rows, out, partial, config)
    response.response_scale(partial, gamma, scale)
    response.apply_response(out.view(images, rows, -1), scale)
    assert_near(x.addmm_(out, contract.T), expected.double(), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_once(dtype):
    x, w, bias = operands((2, 96, 72, 80), dtype)
    config = CONFIGS["tall, descriptors"]
    out = x.new_empty(192, 80)
    partial = x.new_empty(2, products.response_chunks(96, config), 80, dtype=torch.float32)
    products.linear_gelu_response(x, w, bias, 96, out, partial, config)
    assert_near(out, F.gelu(F.linear(x.double(), w.double(), bias.double())), ROUNDING[dtype])
    assert_near(partial.sum(1), out.double().view(2, 96, 80).square().sum(1), 1e-6)


def test_every_step_is_taken_once_whatever_the_number_of_programs():
    """With ones for operands a step left out or taken twice shows as a wrong count."""
    for rows, k, per_sm in [(32, 16, 1), (32, 176, 3), (160, 48, 1), (352, 32, 2)]:
        config = Config(32, 32, 16, schedule="loop", per_sm=per_sm)
        out = products.linear(torch.ones(rows, k), torch.ones(96, k), None, torch.empty(rows, 96), config)
        assert torch.equal(out, torch.full_like(out, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantised_rows_are_within_the_format(dtype):
    x = (normal(37, 80) * torch.logspace(-6, 6, 37)[:, None]).to(dtype)
    x[5] = 0
    for (x8, scale), exact in ((fp8.quantise_rows(x), False), (quantise(x, E4M3), True)):
        back = x8.double() * scale[:, None].double()
        bound = torch.maximum(x.double().abs() / 16, scale[:, None].double() / 1024)
        assert ((back - x.double()).abs() <= bound * (1 + 1e-5)).all()
        largest = x.double().abs().amax(dim=1)
        if exact:
            torch.testing.assert_close(back.abs().amax(dim=1), largest, rtol=1e-6, atol=0)
        else:  # a power of two, the least that fits
            present = largest > 0
            assert torch.equal(scale.log2(), scale.log2().round())
            assert (largest <= 448 * scale).all()
            assert (largest > 224 * scale)[present].all()


def test_response_is_applied_as_it_is_quantised():
    h, scale = normal(2, 36, 80, dtype=torch.bfloat16), normal(2, 80, seed=1)
    h8, row_scale = fp8.apply_response_quantise(h, scale)
    expected = (h.float() * scale[:, None]).flatten(0, 1)
    torch.testing.assert_close(row_scale, 2 ** (expected.abs().amax(dim=1) / 448).log2().ceil())
    assert (
        (h8.float() * row_scale[:, None] - expected).abs() <= expected.abs() / 16 + row_scale[:, None] / 1024
    ).all()


@pytest.mark.parametrize("n", [48, 40], ids=["PyTorch's product", "ours"])
def test_quantised_product(n):
    x, w, bias = operands((2, 36, 80, n), torch.bfloat16)
    (x8, sx), (w8, sw) = fp8.quantise_rows(x), quantise(w, E4M3)
    expected = F.linear(x8.double() * sx[:, None], w8.double() * sw[:, None], bias.double())
    for product in (fp8.quantised_linear, fp8.scaled_product):
        out = product(x8, sx, w8, sw, bias, x.new_empty(72, n))
        assert_near(out, expected, 2**-8)


@configs
def test_a_product_is_added_to_what_is_there(config):
    """In bf16, e4m3 and with int8 weights, rounded once."""
    x, w, _ = operands((2, 36, 80, 48), torch.bfloat16)
    before = normal(72, 48, dtype=torch.bfloat16, seed=3)
    (x8, sx), (w8, sw), (w_int8, s_int8) = (
        fp8.quantise_rows(x),
        quantise(w, E4M3),
        quantise(w, INT8),
    )
    kinds = [
        ((x, w), (None, None), F.linear(x.double(), w.double())),
        ((x8, w8), (sx, sw), F.linear(x8.double() * sx[:, None], w8.double() * sw[:, None])),
        ((x, w_int8), (None, s_int8), F.linear(x.double(), w_int8.double() * s_int8[:, None])),
    ]
    for (rows, weight), (row_scale, column_scale), change in kinds:
        out = products.add_linear(rows, weight, before.clone(), config, row_scale, column_scale)
        assert_near(out, before.double() + change, 2**-8)


@configs
@pytest.mark.parametrize("rows", [64, 36])
def test_response_of_a_quantised_product(config, rows):
    x, w, bias = operands((2, rows, 80, 48), torch.bfloat16)
    (x8, sx), (w8, sw) = fp8.quantise_rows(x), quantise(w, E4M3)
    out, partial = x.new_empty(2 * rows, 48), torch.empty(2, products.response_chunks(rows, config), 48)
    products.linear_gelu_response(x8, w8, bias, rows, out, partial, config, sx, sw)
    expected = F.gelu(F.linear(x8.double() * sx[:, None], w8.double() * sw[:, None], bias.double()))
    assert_near(out, expected, 2**-8)
    assert_near(partial.sum(1), out.double().view(2, rows, 48).square().sum(1), 1e-6)


@configs
def test_int8_weights(config):
    x, w, bias = operands((2, 36, 80, 48), torch.bfloat16)
    w8, scale = quantise(w, INT8)
    assert ((w8 * scale[:, None] - w).abs() <= 0.5001 * scale[:, None]).all()
    out = products.linear(x, w8, bias, x.new_empty(72, 48), config, column_scale=scale)
    assert_near(out, F.linear(x.double(), w8.double() * scale[:, None], bias.double()), 2**-8)


def test_table_names_functions_and_configs():
    for ops in json.loads(TABLE.read_text(encoding="utf-8")).values():
        for op, winners in ops.items():
            assert callable(getattr(products, op.removesuffix("_e4m3").removesuffix("_int8")))
            assert all(winner == "cublas" or Config(**winner) for winner in winners.values())


def test_a_product_that_was_not_measured_is_computed_as_its_nearest():
    winners = {"1152x8192x2048": {"block_m": 128}, "512x8192x2048": "cublas"}
    assert nearest(winners, 1152, 8192, 2048) == {"block_m": 128}
    assert nearest(winners, 1536, 8192, 2048) == {"block_m": 128}
    assert nearest(winners, 600, 8192, 2048) == "cublas"
    assert nearest(winners, 2400, 8192, 2048) == "cublas"  # more than twice the rows
    assert nearest(winners, 1152, 2048, 2048) == "cublas"
    assert products.choose("linear", 1152, 8192, 2048, "cpu") is None
