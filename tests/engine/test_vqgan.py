"""Stage A's decoder bound for the CPU against Stage A itself."""

import pytest
import torch

from cascade_nodes.cascade_core.config import StageAConfig
from cascade_nodes.cascade_core.engine import vqgan
from cascade_nodes.cascade_core.stage_a import StageA

CONFIG = StageAConfig(levels=2, bottleneck_blocks=2, c_hidden=24, c_latent=4, codebook_size=8)
TOLERANCE = 3e-6  # of the largest value, in float32


@pytest.fixture
def stage_a():
    torch.manual_seed(0)
    network = StageA(CONFIG).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.normal_(0, 0.3)
    return network


def assert_same(stage_a, fast, latent):
    with torch.inference_mode():
        expected = stage_a.decode(latent)
    decoded = fast(latent)
    assert decoded.shape == expected.shape
    assert (decoded - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (16, 12)])
def test_it_decodes_as_stage_a(stage_a, size, monkeypatch):
    monkeypatch.setattr(vqgan.BoundPlain, "hidden_bytes", 40 * 96 * 4)  # 40 positions, or 80, at once
    fast = vqgan.FastDecoder(stage_a)
    for batch in (1, 3):
        assert_same(stage_a, fast, torch.randn(batch, 4, *size))


def test_it_follows_the_weights(stage_a):
    fast = vqgan.FastDecoder(stage_a)
    latent = torch.randn(1, 4, 6, 6)
    assert_same(stage_a, fast, latent)
    stage_a.up_blocks[1].gammas.mul_(0.5)
    assert_same(stage_a, fast, latent)


def test_bf16_is_as_near_to_float32_as_stage_a_itself(stage_a):
    latent = torch.randn(1, 4, 8, 8)
    with torch.inference_mode():
        exact = stage_a.decode(latent)
        stage_a.bfloat16()
        own = (stage_a.decode(latent.bfloat16()) - exact).norm()
    fast = (vqgan.FastDecoder(stage_a)(latent.bfloat16()) - exact).norm()
    assert fast <= 1.2 * own <= 0.05 * exact.norm()


def test_half_precision_is_left_to_stage_a(stage_a):
    stage_a.half()
    latent = torch.randn(1, 4, 4, 4).half()
    with torch.inference_mode():
        assert torch.equal(vqgan.FastDecoder(stage_a)(latent), stage_a.decode(latent))
