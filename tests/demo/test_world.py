"""The toy world: what is sampled, what is held out, and what is drawn."""

from collections import Counter

import pytest
import torch

from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.demo.scenes import MARGIN, RADIUS, is_held_out_triple
from cascade_nodes.demo.shapes import SHAPES as DISTANCES
from cascade_nodes.demo.world import (
    BACKGROUND_RGB,
    BACKGROUNDS,
    COLOUR_RGB,
    COLOURS,
    INVERSE,
    RELATIONS,
    SHAPES,
    Scene,
    SceneObject,
    held_out_reason,
    pack,
    render,
    sample_scenes,
)


def single(shape="circle", colour="red", radius=0.19, background="sky", x=0.5, y=0.5):
    return Scene((SceneObject(shape, colour, "large", x, y, radius),), background)


def test_the_held_out_pairs_take_each_shape_and_each_colour_once():
    pairs = [(s, c) for s in SHAPES for c in COLOURS if held_out_reason(single(s, c)) == "pair"]
    assert len(pairs) == 8
    assert {s for s, _ in pairs} == set(SHAPES)
    assert {c for _, c in pairs} == set(COLOURS)


def test_held_out_triples_are_a_tenth_and_the_same_from_either_side():
    kinds = torch.cartesian_prod(torch.arange(64), torch.arange(4), torch.arange(64)).numpy()
    first, relation, second = kinds.T
    held_out = is_held_out_triple(first, relation, second)
    inverse = [RELATIONS.index(INVERSE[name]) for name in RELATIONS]
    turned = is_held_out_triple(second, torch.tensor(inverse).numpy()[relation], first)
    assert (held_out == turned).all()
    assert 0.095 < held_out.mean() < 0.105


def test_the_choice_of_triples_never_changes():
    all_triples = torch.cartesian_prod(torch.arange(64), torch.arange(4), torch.arange(64)).numpy().T
    held_out = is_held_out_triple(*all_triples)
    assert held_out.sum() == 1684
    assert held_out.nonzero()[0][:5].tolist() == [3, 11, 19, 20, 32]


def test_training_scenes_hold_nothing_out():
    scenes = sample_scenes(3000, seed=1)
    assert {held_out_reason(scene) for scene in scenes} == {None}
    assert 0.31 < sum(len(scene.objects) == 1 for scene in scenes) / len(scenes) < 0.36


def test_held_out_scenes_are_half_pairs_and_half_triples():
    reasons = Counter(held_out_reason(scene) for scene in sample_scenes(1000, seed=1, split="held_out"))
    assert reasons == {"pair": 500, "triple": 500}


def test_training_sees_every_word():
    scenes = sample_scenes(3000, seed=2)
    objects = [o for scene in scenes for o in scene.objects]
    assert len({(o.shape, o.colour) for o in objects}) == 64 - 8
    assert {scene.relation for scene in scenes} == {None, *RELATIONS}
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert len({(o.shape, o.size) for o in objects}) == 16


def test_objects_stay_in_the_frame_apart_and_as_related():
    for scene in sample_scenes(2000, seed=3) + sample_scenes(1000, seed=3, split="held_out"):
        for o in scene.objects:
            low, high = RADIUS[o.size]
            assert low <= o.radius <= high
            assert all(MARGIN + o.radius - 1e-9 <= v <= 1 - MARGIN - o.radius + 1e-9 for v in (o.x, o.y))
        if scene.relation:
            a, b = scene.objects
            dx, dy = b.x - a.x, b.y - a.y
            gap, across = {"left": (dx, dy), "right": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[
                scene.relation
            ]
            assert gap >= a.radius + b.radius + 0.06 - 1e-9
            assert abs(across) <= 0.1 + 1e-9


def test_sampling_follows_the_seed_alone():
    assert sample_scenes(50, seed=4) == sample_scenes(50, seed=4)
    assert sample_scenes(50, seed=4) != sample_scenes(50, seed=5)


def test_an_unknown_split_is_refused():
    with pytest.raises(CascadeError, match="'test', but it must be 'train' or 'held_out'"):
        sample_scenes(1, 0, "test")


@pytest.mark.parametrize("shape", SHAPES)
def test_distances_have_unit_slope_outside_and_reach_the_frame_of_the_shape(shape):
    axis = torch.linspace(-1.6, 1.6, 641, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    distance = DISTANCES[shape](x, y)
    inside = distance < 0
    assert inside.any()
    assert max(x[inside].abs().max(), y[inside].abs().max()) <= 1.0
    assert max(x[inside].abs().max(), y[inside].abs().max()) > 0.75
    slope_y, slope_x = torch.gradient(distance, spacing=(axis, axis))
    slope = torch.hypot(slope_x, slope_y)[distance > 0.02]
    assert (slope - 1).abs().quantile(0.99) < 0.02


def test_a_picture_shows_background_and_object_where_they_are():
    image = render([single(background="grass", x=0.3, y=0.6, radius=0.18)])[0].float() / 255
    assert image.shape == (3, 256, 256)
    top, bottom = torch.from_numpy(BACKGROUND_RGB[BACKGROUNDS.index("grass")])
    assert torch.allclose(image[:, 0], top[:, None].expand(-1, 256), atol=0.003)
    assert torch.allclose(image[:, -1], bottom[:, None].expand(-1, 256), atol=0.003)
    body = image[:, int(0.62 * 256), int(0.31 * 256)]
    assert (body - torch.from_numpy(COLOUR_RGB[0])).abs().max() < 0.15


def test_light_comes_from_the_top_left_and_the_shadow_falls_to_the_bottom_right():
    image = render([single("circle", "blue", background="sand")]).float()[0].sum(0)
    empty = render([single("circle", "blue", background="sand", x=-5.0)]).float()[0].sum(0)
    assert image[100, 100] > image[155, 155] + 30  # inside the disc
    shade = empty - image
    near = int(0.5 * 256 + (0.19 * 0.92 * 256 + 3) * 0.5**0.5)
    far = int(0.5 * 256 - (0.19 * 0.92 * 256 + 5) * 0.5**0.5)
    assert shade[near, near] > 60
    assert shade[far, far].abs() < 30


def test_a_picture_does_not_depend_on_its_batch_and_scales():
    scenes = sample_scenes(9, seed=6)
    together = render(scenes, chunk=4)
    assert torch.equal(together, torch.cat([render([scene]) for scene in scenes]))
    assert torch.equal(together, render(pack(scenes)))
    small = torch.nn.functional.avg_pool2d(together.float(), 4)
    assert (render(scenes, size=64).float() - small).abs().mean() < 1.5


def test_no_colour_vanishes_on_any_background():
    scenes = [single("square", colour, background=ground) for ground in BACKGROUNDS for colour in COLOURS]
    images = render(scenes, size=64).float() / 255
    difference = (images[:, :, 24:40, 24:40] - images[:, :, 24:40, :1]).square().sum(1).sqrt()
    assert difference.amin((1, 2)).min() > 0.15
