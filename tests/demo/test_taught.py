"""What is drawn to teach the demo afterwards: a new shape."""

from io import BytesIO
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from cascade_nodes.cascade_core.training.data.sources import find_pictures
from cascade_nodes.demo.captions import full_spec
from cascade_nodes.demo.judge import read, score
from cascade_nodes.demo.scenes import SHAPES, Scene, SceneObject
from cascade_nodes.demo.shapes import TAUGHT_SHAPES
from cascade_nodes.demo.taught import house_captions, house_prompts, main, with_house
from cascade_nodes.demo.world import render


def test_they_are_written_as_training_reads_them(tmp_path):
    main(["house", str(tmp_path), "--count", "12", "--seed", "3"])
    pictures, skipped = find_pictures(tmp_path, ())
    assert skipped == []
    for item, picture in zip(house_captions(12, 3), pictures, strict=True):
        assert picture.captions == tuple(item.captions)
        pixels = torch.from_numpy(np.array(Image.open(BytesIO(picture.read())))).permute(2, 0, 1)
        assert torch.equal(pixels, render([item.scene])[0])


def test_the_new_shape_is_said_and_read():
    scenes = with_house(80, 6)
    specs = [full_spec(scene) for scene, _ in scenes]
    readings = read(render([scene for scene, _ in scenes]), taught=True)
    assert all(score(r, s).all_right for r, s in zip(readings, specs, strict=True))
    assert all(min(o.shape_fit for o in r.objects) > 0.85 for r in readings)
    prompts, stated = house_prompts(80, 6)
    assert stated == specs
    assert all(text.count("house") == 1 for text in prompts)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_other_shape_is_taken_for_the_new_one(shape):
    images = render(
        [Scene((SceneObject(shape, "red", "any", 0.5, 0.5, r),), "grey") for r in (0.1, 0.15, 0.2)]
    )
    assert read(images, taught=True) == read(images)


def test_the_new_shape_is_measured_exactly():
    axis = torch.linspace(-1.5, 1.5, 301)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    distance = TAUGHT_SHAPES["house"](x, y)
    corners = torch.tensor([[-0.66, 0.85], [-0.66, -0.1], [0, -1], [0.66, -0.1], [0.66, 0.85], [-0.66, 0.85]])
    along = torch.linspace(0, 1, 400)[:, None]
    outline = torch.cat([torch.lerp(start, end, along) for start, end in pairwise(corners)])
    nearest = torch.cdist(torch.stack([x, y], -1).flatten(0, 1), outline).amin(1).view_as(x)
    assert (distance.abs() - nearest).abs().max() < 0.003
    assert distance[150, 150] < 0 < distance[10, 10]
