"""What is drawn to teach the demo afterwards: a new shape; image prompts of the objects of their scene, elsewhere."""

from io import BytesIO
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from cascade_nodes.cascade_core.training.data.sources import find_pictures
from cascade_nodes.demo.captions import full_spec, holds, parse
from cascade_nodes.demo.judge import read, score
from cascade_nodes.demo.scenes import SHAPES, Scene, SceneObject, held_out_reason
from cascade_nodes.demo.shapes import TAUGHT_SHAPES
from cascade_nodes.demo.taught import house_prompts, main, mixing_captions, with_house
from cascade_nodes.demo.world import render


def kinds(scene):
    return sorted((o.shape, o.colour, o.size) for o in scene.objects)


def test_two_pictures_prompt_for_a_scene_of_both_their_objects():
    pairs = [item for item in mixing_captions(300, 4) if len(item.prompts) == 2]
    assert 75 <= len(pairs) <= 125  # half of two thirds
    swapped = 0
    for scene, captions, (first, second) in pairs:
        assert kinds(scene) == sorted(kinds(first) + kinds(second))
        assert scene.background in (first.background, second.background)
        assert not {(o.x, o.y) for o in scene.objects} & {
            (o.x, o.y) for o in (*first.objects, *second.objects)
        }
        assert all(holds(parse(text), scene) for text in captions)
        assert held_out_reason(scene) is None
        swapped += kinds(first)[0][:2] != (scene.objects[0].shape, scene.objects[0].colour)
    assert 0.3 < swapped / len(pairs) < 0.7
    assert (
        0.2 < sum(first.background != second.background for _, _, (first, second) in pairs) / len(pairs) < 0.6
    )


def test_one_picture_prompts_for_the_same_scene_elsewhere():
    singles = [item for item in mixing_captions(300, 4) if len(item.prompts) == 1]
    assert {len(scene.objects) for scene, _, _ in singles} == {1, 2}
    for scene, _, (prompt,) in singles:
        assert (kinds(scene), scene.background, scene.relation) == (
            kinds(prompt), prompt.background, prompt.relation,
        )  # fmt: skip
        assert all(a.x != b.x for a, b in zip(scene.objects, prompt.objects, strict=True))


def test_they_are_written_as_training_reads_them(tmp_path):
    main(["mixing", str(tmp_path), "--count", "12", "--seed", "3"])
    pictures, skipped = find_pictures(tmp_path, ())
    assert skipped == []
    items = list(mixing_captions(12, 3))
    for item, picture in zip(items, pictures, strict=True):
        assert picture.captions == tuple(item.captions)
        pixels = [np.array(Image.open(BytesIO(p.read()))) for p in (picture, *picture.image_prompts)]
        expected = render([item.scene, *item.prompts])
        assert torch.equal(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), expected)


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
