"""Pictures larger than the demo was trained at, and of other proportions; figures of a few prompts."""

import pytest
import torch

from cascade_nodes.demo.dataset import as_float, pictures
from cascade_nodes.demo.evaluate import SEED, prompts_of
from cascade_nodes.demo.high_resolution import at_size, detail, high_resolution, placeless, rates, squared
from cascade_nodes.demo.pipeline import DemoCascade
from cascade_nodes.demo.world import sample_scenes


@pytest.fixture(scope="module")
def cascade() -> DemoCascade:
    return DemoCascade.load()


@pytest.mark.nightly
def test_a_second_pass_keeps_what_the_first_shows_and_adds_detail(cascade):
    figures, images = high_resolution(cascade, 4, scale=2, way="enlarged", tile_pixels=256)
    assert images.shape == (4, 3, 512, 512)
    assert figures["with_more_at_2x"] == figures["with_fewer_at_2x"] == 0
    for name in ("objects_colour", "relations", "backgrounds", "counts"):
        assert figures[f"{name}_at_2x"] == 1
    assert figures["kept"] >= 0.8
    assert figures["detail"] >= 0.35  # 0.27 where the first picture is only enlarged


def test_the_finest_detail_of_a_picture():
    sharp = as_float(pictures(sample_scenes(4, SEED, "held_out"), torch.device("cpu"), 256))
    soft = torch.nn.functional.avg_pool2d(sharp, 5, stride=1, padding=2, count_include_pad=False)
    assert detail(soft) < 0.5 * detail(sharp)
    assert detail(torch.full((1, 3, 8, 8), 0.3)) == pytest.approx(0, abs=1e-6)


def test_the_judge_reads_pictures_of_other_proportions(cascade):
    figures, images = at_size(cascade, 2, (192, 320))
    assert images.shape == (2, 3, 192, 320)
    assert "objects_size" not in figures  # what is large in a frame that is not square?
    assert figures["backgrounds"] >= 0.5


def test_cropped_renders_are_read_right():
    scenes = [
        scene
        for scene in sample_scenes(60, SEED, "held_out")
        if all(0.22 + o.radius < o.y < 0.78 - o.radius for o in scene.objects)
    ]
    _, specs = prompts_of(scenes)
    assert len(scenes) >= 8
    images = as_float(pictures(scenes, torch.device("cpu"), 256))[:, :, 51:205]
    assert rates(squared(images), [placeless(spec) for spec in specs])["all_right"] == 1
