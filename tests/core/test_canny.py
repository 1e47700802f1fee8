"""The Canny hint against the published filter's output and against edges worked out by hand."""

import pytest
import torch
from torch import Tensor

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.hints.canny import canny_hint
from cascade_nodes.tests.golden_weights import read_golden, relative_error


def step(heights: list[int], column: int = 4) -> Tensor:
    """A black 8 × 8 image (1, 3, 8, 8) whose row y is heights[y] / 255 from `column` on."""
    image = torch.zeros(1, 3, 8, 8)
    image[..., column:] = torch.tensor(heights)[:, None].add(0.5).div(255)  # truncation gives heights back
    return image


def edge_columns(image: Tensor, **thresholds: int) -> list[list[int]]:
    """The columns with an edge, row by row, found at the image's own 8 × 8 pixels."""
    edges = canny_hint(image, size=8, **thresholds)
    assert edges.shape == (1, 1, 8, 8)
    assert set(edges.unique().tolist()) <= {0.0, 1.0}
    return [row.nonzero().flatten().tolist() for row in edges[0, 0]]


def test_as_published():
    tensors, _ = read_golden("canny_filter")
    edges = canny_hint(tensors["in.image"])
    assert 0 < edges.mean() < 1
    assert relative_error(edges, tensors["out.edges"]) <= 1e-5


def test_a_step_is_one_pixel_thick_up_to_the_border():
    # 4 · 250 on both sides of the step: of equals the left pixel, or the upper one, is kept
    image = step([250] * 8)
    assert edge_columns(image) == [[3]] * 8
    assert edge_columns(image.transpose(-1, -2)) == [[]] * 3 + [list(range(8))] + [[]] * 4


def test_the_channel_with_the_largest_gradient_counts():
    image = step([250] * 8, column=6)
    image[:, 0] = step([60] * 8, column=3)[:, 0]
    image[:, 1:2] = 0.5
    assert edge_columns(image) == [[2, 5]] * 8
    image[:, 0] = 0
    assert edge_columns(image) == [[5]] * 8


def test_weak_edges_need_a_strong_one():
    # a step of height h has the gradient 4h: 40 is between the thresholds, 60 above both
    assert edge_columns(step([40] * 8)) == [[]] * 8
    assert edge_columns(step([50] * 8)) == [[]] * 8  # 200 is not above 200
    assert edge_columns(step([40] * 8), high=150) == [[3]] * 8
    # from 40 to 61 the upper rows are weak, yet joined to the strong lower ones; the rise adds |dy| at column 4
    assert edge_columns(step([40, 43, 46, 49, 52, 55, 58, 61])) == [[4]] * 8
    parted = step([61, 61, 61, 0, 0, 0, 30, 30])
    assert edge_columns(parted)[:2] == [[3]] * 2
    assert edge_columns(parted)[4:] == [[]] * 4  # weak all around, at most 180 at the corner
    assert edge_columns(parted, high=100)[7] == [3]


def test_values_are_truncated_to_8_bits():
    assert edge_columns(step([51] * 8)) == [[3]] * 8
    assert edge_columns(step([51] * 8) * (50.9 / 51.5)) == [[]] * 8


def test_every_image_of_a_batch_has_its_own_edges():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 5, 4, generator=generator)
    images = torch.nn.functional.interpolate(images, size=(96, 64), mode="nearest")
    before = images.clone()
    hints = canny_hint(images)
    assert hints.shape == (3, 1, 96, 64)
    assert hints.dtype == torch.float32
    assert hints.amin() == 0
    assert (hints.amax((1, 2, 3)) > 0.5).all()
    assert torch.equal(hints, torch.cat([canny_hint(image[None]) for image in images]))
    assert torch.equal(hints, canny_hint(images))
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    "images",
    [torch.zeros(3, 8, 8), torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)],
)
def test_other_images_are_refused(images):
    with pytest.raises(CascadeError, match="expects RGB images"):
        canny_hint(images)


@pytest.mark.parametrize(("low", "high"), [(200, 100), (-1, 100)])
def test_thresholds_out_of_order_are_refused(low, high):
    with pytest.raises(CascadeError, match="0 <= low <= high"):
        canny_hint(torch.zeros(1, 3, 8, 8), low, high)
