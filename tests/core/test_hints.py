"""Hints against the published filters, worked out by hand, and what is refused."""

import pytest
import torch

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.hints.filters import (
    identity_map,
    inpaint_hint,
    mask_of,
    shrink,
    super_resolution_hint,
)


def test_the_masked_part_is_white_and_the_mask_is_the_fourth_channel():
    images = torch.rand(2, 3, 6, 8)
    before = images.clone()
    mask = torch.zeros(2, 6, 8)
    mask[0, 1:3, 2:5] = 1
    mask[1, :, 7] = 0.51
    mask[1, :, 0] = 0.5
    hint = inpaint_hint(images, mask)
    assert hint.shape == (2, 4, 6, 8)
    assert torch.equal(hint[:, 3], (mask > 0.5).float())
    masked = hint[:, 3:].bool().expand(-1, 3, -1, -1)
    assert (hint[:, :3][masked] == 1).all()
    assert torch.equal(hint[:, :3][~masked], images[~masked])
    assert torch.equal(images, before)
    lower = inpaint_hint(images, mask, threshold=0.49)
    assert (lower[1, :, :, 0] == 1).all()


def test_one_mask_of_another_size_serves_every_picture():
    images, mask = torch.rand(3, 3, 8, 8), torch.zeros(1, 4, 4)
    mask[:, 2:] = 1
    hint = inpaint_hint(images, mask)
    assert torch.equal(hint[:, 3, :, 0], torch.tensor([0.0] * 4 + [1.0] * 4).expand(3, 8))
    assert torch.equal(mask_of(mask[:, None], 3, (4, 4)), mask[:, None].expand(3, 1, 4, 4))


@pytest.mark.parametrize("shape", [(8, 8), (1, 2, 8, 8), (1, 0, 8)])
def test_other_masks_are_refused(shape):
    with pytest.raises(CascadeError, match="The mask has the shape"):
        inpaint_hint(torch.rand(1, 3, 8, 8), torch.zeros(shape))


def test_two_masks_for_three_pictures_are_refused():
    with pytest.raises(CascadeError, match="2 masks came with 3 pictures"):
        inpaint_hint(torch.rand(3, 3, 8, 8), torch.zeros(2, 8, 8))


def test_each_position_of_the_small_latent_is_repeated():
    small = torch.rand(2, 3, 64, 96)

    def compress(pictures):  # one number for each 32 × 32 pixels
        return torch.nn.functional.avg_pool2d(pictures.mean(1, keepdim=True), 32).expand(-1, 16, -1, -1)

    hint = super_resolution_hint(compress, small, (4, 6))
    assert torch.equal(hint, compress(small).repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert super_resolution_hint(compress, small, (3, 5)).shape == (2, 16, 3, 5)
    with pytest.raises(CascadeError, match="multiples of 32"):
        super_resolution_hint(compress, torch.rand(1, 3, 60, 64), (4, 4))


def test_small_pictures_of_the_published_training_are_every_second_pixel():
    images = torch.rand(1, 3, 8, 6)
    expected = torch.nn.functional.interpolate(images, scale_factor=0.5, mode="nearest")
    assert torch.equal(shrink(images), expected)


def published_positions(box: list[float]) -> list[int]:
    """The rows and columns of a box in the published filter, whose picture has 32 pixels to a position."""
    left, top, right, bottom = (torch.tensor(box, dtype=torch.int) / 32).clamp(min=0).round().int().tolist()
    return [left, top, max(right, left + 1), max(bottom, top + 1)]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([32, 64, 96, 160], [1, 2, 3, 5]),
        ([-20, -5, 40, 47.9], [0, 0, 1, 1]),
        ([48, 48.5, 112, 113], [2, 2, 4, 4]),  # 1.5 and 3.5 are rounded to even
        ([100, 100, 104, 104], [3, 3, 4, 4]),  # at least one position
        ([16.9, 300, 900, 320], [0, 9, 8, 10]),
    ],
)
def test_a_face_lies_where_the_published_filter_puts_it(box, expected):
    embedding = torch.randn(1, 512)
    found = identity_map(embedding, torch.tensor([box]), (320, 256), (10, 8))
    left, top, right, bottom = expected
    assert [left, top, min(published_positions(box)[2], 8), bottom] == [left, top, right, bottom]
    norms = torch.zeros(10, 8)
    norms[top:bottom, left:right] = 1
    assert torch.allclose(found[0].norm(dim=0), norms, atol=1e-6)
    assert torch.allclose(found[0, :, top, left], embedding[0] / embedding[0].norm())


def test_a_picture_of_another_size_is_measured_in_positions():
    embedding, box = torch.randn(1, 512), torch.tensor([[100.0, 200.0, 300.0, 400.0]])
    small = identity_map(embedding, box / 2, (512, 400), (12, 10))
    assert torch.equal(identity_map(embedding, box, (1024, 800), (12, 10)), small)


def test_the_later_face_is_on_top_and_a_face_outside_stays_at_the_border():
    embeddings = torch.eye(2, 512)
    boxes = torch.tensor([[0.0, 0.0, 64.0, 64.0], [32.0, 32.0, 96.0, 96.0]])
    found = identity_map(embeddings, boxes, (96, 96), (3, 3))[0]
    assert found[0].tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert found[1].tolist() == [[0, 0, 0], [0, 1, 1], [0, 1, 1]]
    outside = identity_map(embeddings[:1], torch.tensor([[500.0, 500.0, 600.0, 600.0]]), (96, 96), (3, 3))
    assert outside[0, 0].tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 1]]


def test_no_face_is_an_empty_map():
    assert not identity_map(torch.zeros(0, 512), torch.zeros(0, 4), (96, 96), (3, 3)).any()


def test_other_embeddings_are_refused():
    with pytest.raises(CascadeError, match="expects \\(faces, 512\\) and \\(faces, 4\\)"):
        identity_map(torch.zeros(512), torch.zeros(1, 4), (96, 96), (3, 3))
    with pytest.raises(CascadeError, match="expects"):
        identity_map(torch.zeros(2, 512), torch.zeros(1, 4), (96, 96), (3, 3))
    with pytest.raises(CascadeError, match="NaN or infinity"):
        identity_map(torch.full((1, 512), torch.nan), torch.zeros(1, 4), (96, 96), (3, 3))


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 4, 64, 64)])
def test_other_pictures_are_refused(shape):
    with pytest.raises(CascadeError, match="expects RGB images"):
        inpaint_hint(torch.rand(shape), torch.zeros(1, 64, 64))
    with pytest.raises(CascadeError, match="expects RGB images"):
        super_resolution_hint(lambda pictures: pictures, torch.rand(shape), (2, 2))
