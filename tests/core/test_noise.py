"""Noise belongs to the image: its seed and index, never its batch."""

import pytest
import torch

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.diffusion.noise import NoiseSource

SHAPE = (4, 5, 6)


def test_a_batch_is_its_single_images():
    batch = NoiseSource(7, 3, SHAPE)
    singles = [NoiseSource(7, [index], SHAPE) for index in range(3)]
    for _ in range(4):  # the start and three steps
        drawn = batch.draw()
        assert drawn.shape == (3, *SHAPE)
        assert drawn.dtype == torch.float32
        assert torch.equal(drawn, torch.cat([single.draw() for single in singles]))


def test_indices_pick_images_of_a_larger_batch():
    assert torch.equal(NoiseSource(7, [4, 2], SHAPE).draw(), NoiseSource(7, 5, SHAPE).draw()[[4, 2]])


def test_image_i_of_a_seed_is_image_0_of_the_seed_plus_i():
    assert torch.equal(NoiseSource(7, [3], SHAPE).draw(), NoiseSource(10, 1, SHAPE).draw())


def test_a_stream_continues():
    generator = torch.Generator().manual_seed(7)
    expected = [torch.randn(SHAPE, generator=generator) for _ in range(3)]
    source = NoiseSource(7, 1, SHAPE)
    for noise in expected:
        assert torch.equal(source.draw()[0], noise)


def test_streams_differ():
    first, second = NoiseSource(7, 2, SHAPE).draw()
    assert not torch.equal(first, second)
    assert not torch.equal(NoiseSource(7, 1, SHAPE).draw(), NoiseSource(8, 1, SHAPE).draw())


def test_seeds_wrap_at_two_to_the_64():
    last = NoiseSource(2**64 - 1, 2, SHAPE).draw()
    assert torch.equal(last[1], NoiseSource(0, 1, SHAPE).draw()[0])
    assert torch.equal(NoiseSource(2**64 + 5, 1, SHAPE).draw(), NoiseSource(5, 1, SHAPE).draw())


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    NoiseSource(7, 2, SHAPE).draw()
    assert torch.equal(torch.rand(1), expected)


def test_noise_is_standard_normal():
    noise = NoiseSource(1, 4, (16, 64, 64)).draw()
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.std().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("indices", "shape", "message"),
    [(0, SHAPE, "no images"), ([], SHAPE, "no images"), (1, (4, 0, 6), r"\(4, 0, 6\)"), (1, (), r"\(\)")],
)
def test_empty_noise_is_refused(indices, shape, message):
    with pytest.raises(CascadeError, match=message):
        NoiseSource(1, indices, shape)
