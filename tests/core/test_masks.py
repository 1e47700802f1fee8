"""Masks at a latent's size, soft edges, room around a picture, and the source back: numbers worked out by hand."""

import pytest
import torch

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.hints.masks import composite, expand, fade_inwards, latent_mask


def test_a_position_changes_where_half_of_it_is_masked():
    mask = torch.zeros(1, 8, 12)
    mask[:, :4, :4] = 1  # a whole position
    mask[:, :4, 4:6] = 1  # half of one: not more than half
    mask[:, :4, 8:11] = 1  # three quarters of one
    mask[:, 4:7, 8:12] = 1
    assert latent_mask(mask, 1, (2, 3))[0, 0].tolist() == [[1, 0, 1], [0, 0, 1]]


def test_a_mask_finer_than_the_positions_is_not_lost():
    mask = torch.zeros(1, 64, 64)
    mask[:, 40:44, 33:35] = 1  # 8 of a position's 256 pixels
    mask[:, 41, 31] = 1  # one pixel of the next
    found = latent_mask(mask, 3, (4, 4))
    assert found.shape == (3, 1, 4, 4)
    assert found.nonzero().tolist() == [[image, 0, 2, 2] for image in range(3)]


def test_a_mask_grows_by_whole_positions_to_all_sides():
    mask = torch.zeros(1, 20, 24)
    mask[:, :4, 4:8] = 1  # the second position of the first row
    rows = [latent_mask(mask, 1, (5, 6), grow)[0, 0].sum(1).tolist() for grow in (0, 1, 2)]
    assert rows == [[1, 0, 0, 0, 0], [3, 3, 0, 0, 0], [4, 4, 4, 0, 0]]
    assert not latent_mask(torch.zeros(1, 20, 24), 1, (5, 6), 2).any()


def test_masks_of_a_batch_are_its_own_and_nothing_masked_stays_nothing():
    masks = torch.stack([torch.ones(8, 8), torch.zeros(8, 8)])
    assert latent_mask(masks, 2, (16, 16)).mean((1, 2, 3)).tolist() == [1, 0]  # also of finer latents


def test_room_around_a_picture():
    images = torch.rand(2, 3, 4, 6)
    larger, mask = expand(images, left=3, top=1, right=0, bottom=2, feather=2)
    assert larger.shape == (2, 3, 7, 9)
    assert mask.shape == (1, 7, 9)
    assert torch.equal(larger[..., 1:5, 3:], images)
    assert torch.equal(larger[..., 1:5, 0], images[..., 0])  # the border goes on
    assert mask[0, 3].tolist() == [1, 1, 1, 0.75, 0.25, 0.25, 0.25, 0.25, 0.25]
    assert mask[0, :, 8].tolist() == [1, 0.75, 0.25, 0.25, 0.75, 1, 1]  # no room on the right: no edge there


def test_no_room_and_no_feather():
    images = torch.rand(1, 3, 4, 6)
    same, mask = expand(images, 0, 0, 0, 0, feather=8)
    assert torch.equal(same, images)
    assert not mask.any()
    _, hard = expand(images, 0, 0, 2, 0, feather=0)
    assert hard[0, 0].tolist() == [0] * 6 + [1] * 2
    with pytest.raises(CascadeError, match="none can be below 0"):
        expand(images, 0, -1, 0, 0, 0)


def test_a_mask_fades_inside_itself_and_not_at_the_frame():
    mask = torch.zeros(1, 1, 5, 12)
    mask[..., 4:] = 1
    faded = fade_inwards(mask, 3)
    assert torch.equal(faded[0, 0, 2], torch.tensor([0.0] * 4 + [0.25, 0.5, 0.75] + [1.0] * 5))
    assert torch.equal(fade_inwards(mask, 0), mask)
    assert (fade_inwards(mask / 2, 3) <= mask / 2).all()


def test_outside_the_mask_the_source_comes_back_bit_for_bit():
    generator = torch.Generator().manual_seed(1)
    result, source = torch.rand(2, 2, 3, 16, 16, generator=generator)
    mask = torch.zeros(1, 16, 16)
    mask[:, 4:12, 4:12] = 1
    made = composite(result, source, mask, feather=2)
    outside = (mask == 0).expand(2, -1, -1)[:, None].expand(-1, 3, -1, -1)
    assert torch.equal(made[outside], source[outside])
    assert torch.equal(made[..., 6:10, 6:10], result[..., 6:10, 6:10])
    third = made[0, :, 4, 8] - torch.lerp(source[0, :, 4, 8], result[0, :, 4, 8], 1 / 3)
    assert third.abs().max() < 1e-6


def test_one_source_serves_several_results_of_another_size():
    result, source = torch.rand(3, 3, 8, 8), torch.rand(1, 3, 16, 16)
    made = composite(result, source, torch.zeros(1, 16, 16), feather=0)
    assert torch.equal(made, source.expand(3, -1, -1, -1))
    with pytest.raises(CascadeError, match="3 results came with 2 sources"):
        composite(result, source.repeat(2, 1, 1, 1), torch.zeros(1, 16, 16), 0)


def test_a_soft_mask_keeps_what_lies_between():
    ramp = torch.linspace(0, 1, 16).expand(1, 16, 16)
    soft = latent_mask(ramp, 1, (4, 4), soft=True)
    torch.testing.assert_close(soft[0, 0, 0], ramp[0, 0].reshape(4, 4).mean(1))
    assert latent_mask(ramp, 1, (4, 4))[0, 0, 0].tolist() == [0, 0, 1, 1]
    assert torch.equal(latent_mask(ramp, 1, (4, 4), 1, soft=True)[0, 0, 0, :3], soft[0, 0, 0, 1:])
