"""Shares with their intervals, sets of the evaluation, and the second judge beside the first."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cascade_nodes.demo import read_embeddings, wide_tasks
from cascade_nodes.demo.captions import full_spec, parse
from cascade_nodes.demo.evaluate import lines
from cascade_nodes.demo.judge import read, score
from cascade_nodes.demo.layout import NOTHING, cells_of
from cascade_nodes.demo.pipeline import DECODER, PRIOR
from cascade_nodes.demo.scenes import Scene, SceneObject, sample_scenes
from cascade_nodes.demo.second_reading import agreement, read_again
from cascade_nodes.demo.shares import Share, by_kind, lowest, share
from cascade_nodes.demo.wide_scenes import FRAMES, sample_wide
from cascade_nodes.demo.wide_tasks import EACH, WIDE_TASKS, sample_pairs
from cascade_nodes.demo.world import pack, render


def test_wilsons_interval_is_as_published():
    some = share([True] * 81 + [False] * 182)  # Newcombe 1998, table I: 0.2553 to 0.3662
    assert (some.share, some.count) == (81 / 263, 263)
    assert some.low == pytest.approx(0.2553, abs=1e-4)
    assert some.high == pytest.approx(0.3662, abs=1e-4)
    assert share([True] * 20).high == pytest.approx(1.0)
    assert 0.8 < share([True] * 20).low < 0.85
    assert share([]).count == 0


def test_objects_are_told_by_what_they_are():
    scenes = [
        Scene((SceneObject("star", "red", "large", 0.3, 0.5, 0.18),), "sky"),
        Scene((SceneObject("ring", "red", "small", 0.3, 0.5, 0.11),), "sky"),
    ]
    specs = [full_spec(scene) for scene in scenes]
    wrong = score(read(render(scenes[:1]))[0], specs[1])
    groups = by_kind([score(read(render(scenes[:1]))[0], specs[0]), wrong], specs)
    assert {name: group.share for name, group in groups["pair"].items()} == {"red star": 1.0, "red ring": 0.0}
    assert groups["colour"]["red"][0] == 0.5
    assert groups["size"]["small"][0] == 0.0
    assert lowest(groups["pair"]).startswith("red ring 0.00 (0.00-0.79), red star 1.00")


def test_each_pair_is_asked_for_as_often_half_of_them_small():
    scenes = sample_pairs(EACH, 1)
    assert (np.bincount(scenes.kind[:, 0]) == EACH).all()
    for kind in (0, 63):
        assert (scenes.size[scenes.kind[:, 0] == kind, 0] == 0).sum() == EACH // 2
    beside = scenes.kind[:, 1] >= 0
    assert 0.6 < beside.mean() < 0.7
    assert (scenes.kind[beside, 0] // 8 != scenes.kind[beside, 1] // 8).all()
    assert (scenes.kind[beside, 0] % 8 != scenes.kind[beside, 1] % 8).all()


def test_both_judges_read_renders_right_in_any_frame():
    scenes = sample_scenes(6, 51, "held_out")
    specs = [full_spec(scene) for scene in scenes]
    assert {name: value.share for name, value in agreement(render(scenes), specs).items()} == {
        "agreement": 1.0,
        "first_judge": 1.0,
        "second_judge": 1.0,
    }
    wide = sample_wide(4, 52, objects=(0, 0, 1), frame=FRAMES["16:9"]).scenes()
    readings = read_again(render(wide, FRAMES["16:9"]))
    assert all(
        score(reading, full_spec(scene)).all_right for reading, scene in zip(readings, wide, strict=True)
    )


def test_white_on_light_ground_is_as_large_to_the_second_judge_as_it_is():
    grounds = ("sky", "grass", "pink", "grey")
    objects = [
        SceneObject("diamond", "white", "large", 0.5, 0.5, 0.16),
        SceneObject("cross", "white", "large", 0.5, 0.5, 0.16),
    ]
    images = render([Scene((each,), ground) for each in objects for ground in grounds]).float() / 255
    blurred = F.avg_pool2d(F.pad(images, (2,) * 4, mode="replicate"), 5, 1)  # as decoders draw
    radii = np.array([reading.objects[0].radius for reading in read_again(blurred)])
    assert np.abs(radii / 0.16 - 1).max() < 0.04


def test_the_second_judge_calls_no_mess_right():
    generator = torch.Generator().manual_seed(1)
    mess = torch.rand(3, 3, 256, 256, generator=generator)
    blots = torch.nn.functional.interpolate(torch.rand(3, 3, 9, 9, generator=generator), (256, 256))
    objects = [o for reading in read_again(torch.cat([mess, blots])) for o in reading.objects]
    assert not [o for o in objects if o.shape and o.colour and o.shape_fit > 0.9]
    star = Scene((SceneObject("star", "red", "large", 0.5, 0.5, 0.18),), "sand")
    assert not score(read_again(render([star]))[0], parse("a large red diamond on sand")).all_right
    assert not score(read_again(render([star]))[0], parse("a large orange star on sand")).all_right


@pytest.mark.parametrize("name", ["three", "punctuation", "proportions", "judges"])
def test_a_cascade_that_draws_what_it_is_asked_gets_full_marks(name, monkeypatch):
    """The renderer in place of the networks: every set's prompts are true of its scenes, and are judged so."""
    drawn = []
    sampled = {tasks: getattr(wide_tasks, tasks) for tasks in ("sample_scenes", "sample_wide")}

    def remembering(sample):
        def draw(*arguments, **options):
            scenes = sample(*arguments, **options)
            drawn.append(scenes if isinstance(scenes, list) else scenes.scenes())
            return scenes

        return draw

    for sampler, function in sampled.items():
        monkeypatch.setattr(wide_tasks, sampler, remembering(function))

    def pictures(prompts, *_, size=(256, 256), **__):
        return render(drawn[-1][: len(prompts)], size)

    cascade: Any = SimpleNamespace(device=torch.device("cpu"), batch=16, pictures=pictures)
    figures, _ = WIDE_TASKS[name](cascade, 6, PRIOR, DECODER)
    right = figures.get("all_right", figures.get("agreement_on_pictures"))
    assert isinstance(right, Share)
    assert right.share == 1.0
    assert lines(figures)


def test_shapes_are_read_from_embeddings_that_tell_them(monkeypatch):
    count = 60
    table = sample_wide(12 * count, read_embeddings.SEED + 12, objects=read_embeddings.OBJECTS)
    truth = F.one_hot(cells_of(pack(table)).shape.long(), NOTHING + 1).flatten(1).float()
    monkeypatch.setattr(read_embeddings, "pictures", lambda rows, device: torch.from_numpy(rows.kind))
    monkeypatch.setattr(read_embeddings, "STEPS", 250)
    monkeypatch.setattr(read_embeddings, "BATCH", 64)
    seen = torch.from_numpy(table.kind)

    def embed(kinds, told):
        start = next(i for i in range(len(seen)) if torch.equal(seen[i : i + len(kinds)], kinds))
        return told * truth[start : start + len(kinds)] + 1e-3 * torch.randn(len(kinds), truth.shape[1])

    def figures(told):
        cascade: Any = SimpleNamespace(device=torch.device("cpu"), embed=lambda kinds: embed(kinds, told))
        found: Any = read_embeddings.embeddings(cascade, count, PRIOR, DECODER)[0]
        return found

    torch.manual_seed(0)
    right, guessed = figures(1.0), figures(0.0)
    objects = (table.kind[10 * count :] >= 0).sum(1)
    assert [each.count for each in right.values()] == [n * int((objects == n).sum()) for n in (1, 2, 3)]
    assert min(each.share for each in right.values()) > 0.5
    assert max(each.share for each in guessed.values()) < 0.35
