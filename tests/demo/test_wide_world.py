"""The larger world: three objects, other proportions, chosen shares; and pictures of any colour that hold nothing back
but what is held out."""

from collections import Counter

import numpy as np
import pytest
import torch

from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.demo.reading import read
from cascade_nodes.demo.scenes import MARGIN, RADIUS, is_held_out_pair, sample_scenes, sample_table
from cascade_nodes.demo.second_reading import read_again
from cascade_nodes.demo.shapes import OTHER_SHAPES, TAUGHT_SHAPES, UNLIKE
from cascade_nodes.demo.wide_pictures import MOST_OBJECTS, NEAR, is_held_out, wide_pictures, wide_scenes
from cascade_nodes.demo.wide_scenes import FRAMES, sample_wide
from cascade_nodes.demo.world import (
    BACKGROUND_RGB,
    COLOUR_RGB,
    COLOURS,
    DRAWN,
    SHAPES,
    Packed,
    Scene,
    SceneObject,
    held_out_reason,
    pack,
    render,
)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_a_table_is_drawn_and_packed_as_its_scenes_are(split):
    table, scenes = sample_table(60, 3, split), sample_scenes(60, 3, split)
    assert table.scenes() == scenes
    packed, looped = pack(table), pack(scenes)
    there = looped.shape >= 0
    assert torch.equal(packed.shape, looped.shape)
    assert torch.equal(packed.background, looped.background)
    for name in ("colour", "centre", "radius"):
        assert torch.equal(getattr(packed, name)[there], getattr(looped, name)[there])
    wide = sample_wide(30, 3, split)
    assert torch.equal(render(wide.rows(slice(0, 4)), 64), render(wide.scenes()[:4], 64))


def test_an_empty_slot_changes_no_bit():
    two = pack(sample_scenes(4, 5))
    more = two._replace(
        shape=torch.cat([two.shape, torch.full((4, 1), -1)], 1),
        **{name: getattr(two, name)[:, [0, 1, 0]] for name in ("colour", "centre", "radius")},
    )
    assert torch.equal(render(two, 96), render(more, 96))


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES.keys())
def test_objects_of_wide_scenes_stay_in_the_frame_and_apart(frame):
    short = np.array([frame[1], frame[0]]) / min(frame)
    for scene in sample_wide(200, 1, frame=frame).scenes():
        centres = np.array([(o.x, o.y) for o in scene.objects]) * short
        for o, centre in zip(scene.objects, centres, strict=True):
            low, high = RADIUS[o.size]
            assert low <= o.radius <= high
            assert (centre >= MARGIN + o.radius - 1e-9).all()
            assert (centre <= short - MARGIN - o.radius + 1e-9).all()
        for i, a in enumerate(scene.objects):
            for j, b in enumerate(scene.objects[:i]):
                assert abs(centres[i] - centres[j]).max() >= a.radius + b.radius + 0.06 - 1e-9
        if scene.relation:
            dx, dy = centres[1] - centres[0]
            along = {"left": dx, "right": -dx, "above": dy, "below": -dy}[scene.relation]
            assert along == max(abs(dx), abs(dy))
        assert (scene.relation is None) == (len(scene.objects) == 1)


def test_wide_training_scenes_hold_nothing_out_between_any_two_objects():
    for frame in ("1:1", "16:9"):
        scenes = sample_wide(400, 2, frame=FRAMES[frame]).scenes()
        assert {held_out_reason(scene) for scene in scenes} == {None}
        turned = [Scene(s.objects[::-1], s.background, None, s.aspect) for s in scenes]
        assert {held_out_reason(scene) for scene in turned} == {None}


def test_wide_held_out_scenes_have_a_pair_or_a_triple_in_the_first_relation():
    scenes = sample_wide(200, 2, "held_out", objects=(0, 1, 1)).scenes()
    reasons = [held_out_reason(Scene(s.objects[:2], s.background)) for s in scenes]
    assert Counter(held_out_reason(s) for s in scenes) == {"pair": 100, "triple": 100}
    assert set(reasons[1::2]) == {"triple"}
    with pytest.raises(CascadeError, match="'test', but it must be 'train' or 'held_out'"):
        sample_wide(1, 0, "test")


def test_shares_are_as_weighted():
    table = sample_wide(4000, 4, objects=(0, 0, 1), weights={"small": 3.0, "white": 3.0, "star": 0.0})
    assert (table.kind >= 0).all()
    assert 0.72 < (table.size == 0).mean() < 0.78
    colours = np.bincount(table.kind.ravel() % 8, minlength=8) / table.kind.size
    assert colours[COLOURS.index("white")] > 2.2 * colours[:7].max()
    assert SHAPES.index("star") not in table.kind // 8
    alone = sample_wide(500, 4, objects=(1, 0, 0))
    assert (alone.kind[:, 1:] == -1).all()


def test_shapes_stay_round_in_wide_and_in_tall_frames():
    disc = Scene((SceneObject("circle", "red", "large", 0.5, 0.5, 0.2),), "grey")
    for size in ((64, 128), (128, 64), (64, 64)):
        red = render([disc], size)[0].float()
        inside = red[0] - red[1] > 60
        rows, columns = inside.any(1).sum(), inside.any(0).sum()
        assert rows == columns == 24


def test_pictures_of_any_colour_never_show_a_held_out_pair():
    packed = wide_scenes(3000, 256, torch.Generator().manual_seed(1), "cpu")
    there = packed.shape >= 0
    shape, colour = packed.shape[there], packed.colour[there]
    assert not is_held_out(shape, colour).any()
    palette = torch.from_numpy(COLOUR_RGB)
    trained = shape < len(SHAPES)
    own = palette[(3 * shape + 2) % 8]
    assert (colour - own)[trained].norm(dim=1).min() >= NEAR
    # What may look like a shape of the world has no colour of the world, and what is taught later is not drawn.
    like = ~trained & (shape < len(DRAWN) - len(UNLIKE))
    assert torch.cdist(colour[like], palette).min() >= NEAR
    assert set(shape.tolist()) == set(range(len(SHAPES))) | {list(DRAWN).index(name) for name in OTHER_SHAPES}
    # Each other pair is drawn, in its very colour.
    distance, nearest = torch.cdist(colour, palette).min(1)
    kinds = (8 * shape + nearest)[trained & (distance == 0)].unique().numpy()
    assert len(kinds) == 64 - 8
    assert not is_held_out_pair(kinds).any()
    assert set(there.sum(1).tolist()) == set(range(MOST_OBJECTS + 1))


@pytest.mark.parametrize("name", UNLIKE)
def test_some_shapes_without_a_word_are_like_none_that_has_one_however_they_are_turned(name):
    angles = torch.arange(0, 3.15, 0.45)
    n, index = len(angles), list(DRAWN).index(name)
    grey = torch.tensor(BACKGROUND_RGB[4]).expand(n, 2, 3)
    scenes = Packed(
        torch.full((n, 1), index), torch.tensor(COLOUR_RGB[0]).expand(n, 1, 3), torch.full((n, 1, 2), 0.5),
        torch.full((n, 1), 0.2), grey, angles[:, None],
    )  # fmt: skip
    images = render(scenes)
    for readings in (read(images, taught=True), read_again(images)):
        assert all(o.shape is None for reading in readings for o in reading.objects)
    assert name not in TAUGHT_SHAPES


def test_no_judge_reads_a_held_out_pair_in_them():
    images = wide_pictures(16, 256, torch.Generator().manual_seed(2), "cpu")
    objects = [o for reading in read(images) for o in reading.objects if o.shape and o.colour]
    kinds = np.array([SHAPES.index(o.shape) * 8 + COLOURS.index(o.colour) for o in objects])
    assert len(kinds) > 8
    assert not is_held_out_pair(kinds).any()


def test_the_shape_held_out_in_white_is_about_as_often_pale_as_any_other():
    packed = wide_scenes(8000, 256, torch.Generator().manual_seed(2), "cpu")
    shape, colour = packed.shape.flatten(), packed.colour.flatten(0, 1)
    from_white = (1 - colour).norm(dim=-1)
    pale = ((from_white > NEAR) & (from_white < 2 * NEAR)).float()
    shares = torch.stack([pale[shape == kind].mean() for kind in range(len(SHAPES))])
    assert 0.05 < shares.min() > 0.6 * shares.max()
    white_diamond = SHAPES.index("diamond")
    assert not (from_white[shape == white_diamond] < NEAR).any()


def test_wide_pictures_follow_the_generator_and_take_any_size():
    first, again = (wide_pictures(3, (48, 80), torch.Generator().manual_seed(3), "cpu") for _ in range(2))
    assert first.shape == (3, 3, 48, 80)
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert not torch.equal(first, wide_pictures(3, (48, 80), torch.Generator().manual_seed(4), "cpu"))
