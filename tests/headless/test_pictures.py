"""Pictures as tensors."""

import numpy as np
import pytest
import torch
from PIL import Image

from cascade_nodes.headless.pictures import read_image, read_mask

GRADIENT = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3


def saved(tmp_path, picture, name="p.png", **options):
    picture.save(tmp_path / name, **options)
    return tmp_path / name


def test_a_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn right by 90 degrees
    image, _ = read_image(saved(tmp_path, Image.fromarray(GRADIENT), exif=exif))
    assert np.array_equal((image[0] * 255).round().numpy(), np.rot90(GRADIENT, -1))


def test_the_mask_is_one_where_the_picture_is_transparent(tmp_path):
    alpha = np.array([[0, 51], [204, 255]], dtype=np.uint8)
    rgba = np.dstack([np.full((2, 2, 3), 100, dtype=np.uint8), alpha])
    image, mask = read_image(saved(tmp_path, Image.fromarray(rgba)))
    assert image.shape == (1, 2, 2, 3)
    torch.testing.assert_close(mask, 1 - torch.tensor([[[0.0, 0.2], [0.8, 1.0]]]))
    opaque = read_image(saved(tmp_path, Image.fromarray(GRADIENT)))[1]
    assert torch.equal(opaque, torch.zeros(1, 64, 64))


def test_a_palette_may_be_transparent_too(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpixel((1, 0), 1)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    image, mask = read_image(saved(tmp_path, picture, transparency=0))
    assert image.tolist() == [[[[1, 0, 0], [0, 0, 1]]]]
    assert mask.tolist() == [[[1, 0]]]


def test_sixteen_bits_become_eight_without_clipping(tmp_path):
    grey = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    image, _ = read_image(saved(tmp_path, Image.fromarray(grey)))
    assert (image[0, 0, :, 0] * 255).round().tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize(("name", "value"), [("red", 10), ("green", 20), ("blue", 30), ("alpha", 255 - 40)])
def test_one_channel_as_a_mask(tmp_path, name, value):
    rgba = np.full((3, 2, 4), [10, 20, 30, 40], dtype=np.uint8)
    mask = read_mask(saved(tmp_path, Image.fromarray(rgba)), name)
    torch.testing.assert_close(mask, torch.full((1, 3, 2), value / 255))
