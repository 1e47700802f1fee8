"""Tiles: exact where a network is local, seamless and consistently conditioned where it is not."""

from itertools import pairwise

import pytest
import torch

from cascade_nodes.cascade_core import Previewer, StageA, StageB
from cascade_nodes.cascade_core.networks import stage_a as stage_a_module
from cascade_nodes.cascade_core.networks.tiles import (
    ALIGNMENT,
    OVERLAP,
    PREVIEWER_HALO,
    PREVIEWER_SIDE,
    decode_halo,
    encode_halo,
    fitting_tile,
    in_whole_patches,
    join_tiles,
    overlapping,
    predict_in_tiles,
)
from cascade_nodes.tests.nodes.tiny import CONFIGS, shake

ODD = (61, 47)


def network(kind, **config):
    torch.manual_seed(3)
    built = kind.from_config(config).eval().requires_grad_(False)
    shake(built)
    return built


def difference(first, second):
    assert first.shape == second.shape
    return (first - second).abs().max().item()


@pytest.mark.parametrize(("levels", "blocks"), [(1, 1), (2, 1), (2, 4), (2, 12), (3, 4)])
def test_stage_a_in_tiles_equals_the_whole(levels, blocks):
    stage_a = network(StageA, levels=levels, bottleneck_blocks=blocks, c_hidden=16, codebook_size=8)
    side = 2**levels
    latent = torch.randn(2, 4, *ODD)
    decoded = join_tiles(stage_a.decode, latent, 16, decode_halo(stage_a.config), up=side)
    assert difference(decoded, stage_a.decode(latent)) <= 1e-5
    image = torch.rand(1, 3, *(length * side for length in ODD))
    encoded = join_tiles(stage_a.encode, image, 16, encode_halo(stage_a.config), down=side)
    assert difference(encoded, stage_a.encode(image)) <= 1e-5


def test_stage_a_a_few_rows_at_a_time_equals_the_whole(monkeypatch):
    network_a = network(StageA, levels=2, bottleneck_blocks=2, c_hidden=16, codebook_size=8)
    latent, image = torch.randn(2, 4, *ODD), torch.rand(2, 3, *(length * 4 for length in ODD))
    with torch.inference_mode():
        whole = network_a.decode(latent), network_a.encode(image)
        monkeypatch.setattr(stage_a_module, "HIDDEN_VALUES", 20_000)
        rows = network_a.decode(latent), network_a.encode(image)
    assert max(map(difference, whole, rows)) <= 1e-5


def test_the_largest_tile_that_fits():
    def most(area):
        return lambda positions: positions <= area

    assert fitting_tile(64, 48, 13, most(64 * 48)) == 0
    assert fitting_tile(64, 48, 13, most(64 * 48 - 1)) == 32  # sees 58 × 48
    assert fitting_tile(64, 48, 13, most(40 * 40)) == 13  # sees 39 × 39
    assert fitting_tile(1024, 1024, 13, most(540 * 540)) == 512
    assert fitting_tile(64, 48, 13, most(0)) == 1


def test_the_halo_is_no_wider_than_needed():
    stage_a = network(StageA, levels=2, bottleneck_blocks=2, c_hidden=16, codebook_size=8)
    latent, image = torch.randn(1, 4, *ODD), torch.rand(1, 3, *(length * 4 for length in ODD))
    decoded = join_tiles(stage_a.decode, latent, 16, decode_halo(stage_a.config) - 1, up=4)
    assert difference(decoded, stage_a.decode(latent)) > 1e-4
    encoded = join_tiles(stage_a.encode, image, 16, encode_halo(stage_a.config) - 1, down=4)
    assert difference(encoded, stage_a.encode(image)) > 1e-4
    assert decode_halo(StageA.from_config({}).config) == 13  # published: 52 pixels


def test_the_previewer_in_tiles_equals_the_whole():
    previewer = network(Previewer, c_hidden=16)
    latent = torch.randn(1, 16, 23, 31)
    tiled = join_tiles(previewer, latent, 5, PREVIEWER_HALO, up=PREVIEWER_SIDE)
    assert difference(tiled, previewer(latent)) <= 1e-5
    assert difference(join_tiles(previewer, latent, 5, 1, up=8), previewer(latent)) > 1e-6


def test_memory_is_that_of_a_tile():
    seen = []

    def decode(part):
        seen.append(part.shape[-2:].numel())
        return part[:, :3]

    join_tiles(decode, torch.randn(1, 4, 200, 130), 32, 5)
    assert len(seen) == 7 * 5
    assert max(seen) == (32 + 2 * 5) ** 2


@pytest.mark.parametrize("length", [64, 72, 96, 130, 256, 1024])
def test_overlapping_spans(length):
    spans = overlapping(length, 64)
    assert spans[0].start == 0
    assert spans[-1].stop == length
    for before, after in pairwise(spans):
        assert before.stop - after.start >= 64 * OVERLAP - ALIGNMENT
        assert after.start > before.start
        assert after.start % ALIGNMENT == 0
    assert all(span.stop - span.start <= 64 for span in spans)


def test_tiles_of_a_prediction_that_is_local_do_not_show():
    x, effnet = torch.randn(2, 4, 72, 130), torch.randn(2, 16, 36, 65)

    def predict(part, conditioning):  # each position by itself, with the conditioning that lies there
        return part * 2 + conditioning[:, :4].repeat_interleave(2, 2).repeat_interleave(2, 3)

    assert difference(predict_in_tiles(predict, x, effnet, 32, 2), predict(x, effnet)) <= 1e-5


def test_the_conditioning_of_a_tile_is_what_the_whole_sees_there():
    """With aligned corners a cut piece would be stretched, so resizing comes before cutting."""
    x, ramp = torch.zeros(1, 4, 64, 64), torch.linspace(0, 1, 6).expand(1, 16, 6, 6)
    seen = {}

    def predict(part, conditioning):
        seen[len(seen)] = conditioning
        return part

    predict_in_tiles(predict, x, ramp, 32, 2)
    columns = torch.linspace(0, 1, 32)
    starts = [span.start // 2 for span in overlapping(64, 32)]
    for index, start in enumerate(starts):
        torch.testing.assert_close(seen[index][0, 0, 0], columns[start : start + 16], rtol=0, atol=1e-6)


def test_stage_b_in_one_tile_is_stage_b():
    stage_b = network(StageB, **CONFIGS["stage_b"])
    x, effnet, clip = torch.randn(1, 4, 32, 24), torch.randn(1, 16, 2, 2), torch.randn(1, 1, 64)

    def predict(part, conditioning):
        return stage_b(part, torch.tensor([0.5]), conditioning, clip)

    whole = predict(x, effnet)
    assert torch.equal(predict_in_tiles(predict, x, effnet, 32, 2), whole)
    tiled = predict_in_tiles(predict, x, effnet, 16, 2)
    assert tiled.shape == whole.shape
    assert difference(tiled, whole) > 1e-4  # Stage B is not local
    assert (tiled - whole).square().mean() < 0.05 * whole.square().mean()


def test_a_latent_that_ends_within_a_patch_is_mirrored_on_and_cut_again():
    seen = []

    def predict(part):
        seen.append(part)
        return part * 2

    x = torch.arange(15.0).reshape(1, 1, 3, 5)
    assert torch.equal(in_whole_patches(predict, x, 2), x * 2)
    assert seen[0].shape[-2:] == (4, 6)
    # The last column but one, its last row mirrored as well.
    assert seen[0][0, 0, :, -1].tolist() == [
        3,
        8,
        13,
        8,
    ]
    whole = torch.zeros(1, 1, 4, 6)
    in_whole_patches(predict, whole, 2)
    assert seen[1] is whole


def test_tiles_of_a_latent_that_ends_within_a_patch_do_not_show():
    x, effnet = torch.randn(2, 4, 71, 129), torch.randn(2, 16, 36, 65)

    def predict(part, conditioning):
        def local(patches):  # each position by itself, with the conditioning that lies there
            return patches * 2 + conditioning[:, :4].repeat_interleave(2, 2).repeat_interleave(2, 3)

        return in_whole_patches(local, part, 2)

    assert difference(predict_in_tiles(predict, x, effnet, 32, 2), predict(x, effnet)) <= 1e-5


def test_stage_b_takes_a_latent_that_ends_within_a_patch():
    stage_b = network(StageB, **CONFIGS["stage_b"])
    x, effnet, clip = torch.randn(1, 4, 33, 47), torch.randn(1, 16, 2, 2), torch.randn(1, 1, 64)
    out = in_whole_patches(lambda p: stage_b(p, torch.tensor([0.5]), effnet, clip), x, 2)
    assert out.shape == x.shape
