"""Stage A's decoder bound for the CPU, and for CUDA through interpreted kernels, against Stage A itself."""

import pytest
import torch
from torch.nn import functional as F

from cascade_nodes.cascade_core.engine import vqgan
from cascade_nodes.cascade_core.engine.kernels import depthwise, products
from cascade_nodes.cascade_core.engine.kernels.tuned import Config
from cascade_nodes.cascade_core.networks.config import StageAConfig
from cascade_nodes.cascade_core.networks.stage_a import StageA

CONFIG = StageAConfig(levels=2, bottleneck_blocks=2, c_hidden=24, c_latent=4, codebook_size=8)
TOLERANCE = 3e-6  # of the largest value, in float32


WAYS = {  # of computing a block's MLP on CUDA
    "products": {},
    "gelu in the product": {"linear_gelu": Config(32, 32, 16)},
}


@pytest.fixture
def stage_a():
    torch.manual_seed(0)
    network = StageA(CONFIG).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.normal_(0, 0.3)
    return network


def assert_same(stage_a, engine, latent):
    with torch.inference_mode():
        expected = stage_a.decode(latent)
    decoded = engine(latent)
    assert decoded.shape == expected.shape
    assert (decoded - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (16, 12)])
def test_it_decodes_as_stage_a(stage_a, size, monkeypatch):
    monkeypatch.setattr(vqgan.PlainMixingBlock, "hidden_bytes", 40 * 96 * 4)  # 40 positions, or 80, at once
    engine = vqgan.DecoderEngine(stage_a)
    for batch in (1, 3):
        assert_same(stage_a, engine, torch.randn(batch, 4, *size))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (13, 6)])
def test_its_kernels_decode_as_stage_a(stage_a, size, way, monkeypatch):
    monkeypatch.setitem(vqgan.BINDINGS, "cpu", vqgan.BINDINGS["cuda"])
    monkeypatch.setattr(products, "choose", lambda op, *_: way.get(op))
    monkeypatch.setattr(vqgan.FusedMixingBlock, "hidden_bytes", 40 * 96 * 4)  # 40 positions, or 80, at once
    assert_same(stage_a, vqgan.DecoderEngine(stage_a), torch.randn(2, 4, *size))


@pytest.mark.parametrize(("lines", "limit", "part"), [(256, 43, 43), (64, 43, 32), (5, 9, 5), (5, 0, 1)])
def test_parts_are_equal(lines, limit, part):
    assert vqgan.lines_per_part(lines, limit) == part


def test_it_follows_the_weights(stage_a):
    engine = vqgan.DecoderEngine(stage_a)
    latent = torch.randn(1, 4, 6, 6)
    assert_same(stage_a, engine, latent)
    stage_a.up_blocks[1].gammas.mul_(0.5)
    assert_same(stage_a, engine, latent)


def test_bf16_is_as_near_to_float32_as_stage_a_itself(stage_a):
    latent = torch.randn(1, 4, 8, 8)
    with torch.inference_mode():
        exact = stage_a.decode(latent)
        stage_a.bfloat16()
        own_error = (stage_a.decode(latent.bfloat16()) - exact).norm()
    error = (vqgan.DecoderEngine(stage_a)(latent.bfloat16()) - exact).norm()
    assert error <= 1.2 * own_error <= 0.05 * exact.norm()


def test_half_precision_is_left_to_stage_a(stage_a):
    stage_a.half()
    latent = torch.randn(1, 4, 4, 4).half()
    with torch.inference_mode():
        assert torch.equal(vqgan.DecoderEngine(stage_a)(latent), stage_a.decode(latent))


HALF_STEP = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # relative
dtypes = pytest.mark.parametrize("dtype", HALF_STEP, ids=str)


def normal(*shape, dtype, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(value, expected, rounding):
    torch.testing.assert_close(
        value.double(), expected, rtol=rounding, atol=3e-6 * float(expected.abs().max())
    )


@dtypes
@pytest.mark.parametrize("size", [(5, 7, 24), (9, 16, 48), (1, 1, 20)])
def test_depthwise_gate_norm(size, dtype):
    """The image is computed in three parts, whose borders are not the image's."""
    height, width, channels = size
    h, x = (normal(height * width, channels, dtype=dtype, seed=i) for i in range(2))
    weight, (bias, next_bias) = (
        normal(9, channels, dtype=dtype, seed=2),
        normal(2, channels, dtype=dtype, seed=3),
    )
    gate, scale, shift = gammas = normal(3, dtype=dtype, seed=4)
    image = h.double().T.reshape(1, channels, height, width)
    kernel = weight.double().T.reshape(channels, 1, 3, 3)
    bordered = F.pad(image, (1, 1, 1, 1), mode="replicate")
    convolution = F.conv2d(bordered, kernel, bias.double(), groups=channels)[0].flatten(1).T
    expected = x.double() + gammas[0].double() * convolution
    expected_normal = F.layer_norm(expected, (channels,), eps=1e-6) * (1 + scale.double()) + shift.double()

    out, lines = torch.full_like(x, torch.nan), -(-height // 3)
    for top in range(0, height, lines):
        part = slice(top * width, (top + lines) * width)
        depthwise.depthwise_gate_norm(
            h, weight, bias, gate, x[part], next_bias, scale, shift, out[part], top, height, width, 1e-6, 256
        )
    assert_near(x, expected + next_bias.double(), HALF_STEP[dtype])
    assert_near(out, expected_normal, HALF_STEP[dtype])
