"""The pictures that the example graphs start from are those that the script draws."""

import json

import numpy as np
import pytest
from PIL import Image

from cascade_nodes.demo.example_pictures import FOLDER, example_pictures, main

DRAWN = example_pictures()


def test_the_graphs_need_just_these():
    graphs = [json.loads(path.read_text(encoding="utf-8")) for path in (FOLDER.parent / "api").glob("*.json")]
    used_names = {
        node["inputs"]["image"]
        for graph in graphs
        for node in graph.values()
        if node["class_type"].startswith("LoadImage")
    }
    assert used_names == set(DRAWN) == {path.name for path in FOLDER.iterdir()}


@pytest.mark.parametrize("name", DRAWN)
def test_what_is_shipped_is_what_is_drawn(name):
    with Image.open(FOLDER / name) as picture:
        shipped = np.asarray(picture)
    assert shipped.shape == DRAWN[name].shape
    assert np.abs(shipped.astype(int) - DRAWN[name]).max() <= 1  # another torch may round otherwise
    assert (FOLDER / name).stat().st_size < 20_000


def test_the_hole_keeps_the_colours_below():
    """A disc is transparent, as a mask is painted in ComfyUI; the object to paint over lies in it, hidden but there."""
    hole = DRAWN["cascade_hole.png"]
    masked = hole[..., 3] == 0
    assert 0.1 < masked.mean() < 0.25
    blue = (hole[..., 2] > 180) & (hole[..., 0] < 60)  # the square's, not the sky's
    assert blue.any()
    assert masked[blue].all()


def test_the_script_writes_them(tmp_path):
    main([str(tmp_path / "new")])
    assert {path.name for path in (tmp_path / "new").iterdir()} == set(DRAWN)
    with Image.open(tmp_path / "new" / "cascade_small.png") as picture:
        assert (np.asarray(picture) == DRAWN["cascade_small.png"]).all()
