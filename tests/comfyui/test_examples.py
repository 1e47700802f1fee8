"""The example workflows make the same picture in ComfyUI as without it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cascade_nodes.headless import run_graph

EXAMPLES = Path(__file__).parents[2] / "example_workflows" / "api"


@pytest.fixture(scope="session")
def headless_picture(tmp_path_factory):
    """By the example's name, made once for every version of ComfyUI."""
    made = {}

    def picture(name: str) -> np.ndarray:
        if name not in made:
            folder = tmp_path_factory.mktemp("headless")
            run_graph(EXAMPLES / f"{name}.json", output_folder=folder)
            (file,) = folder.rglob("*.png")
            made[name] = np.asarray(Image.open(file).convert("RGB"))
        return made[name]

    return picture


@pytest.mark.parametrize("name", [path.stem for path in sorted(EXAMPLES.glob("*.json"))])
def test_same_picture_as_without_comfyui(checkout, client, headless_picture, name):
    graph = json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))
    execution = client.run(graph)
    assert execution.error is None
    (picture,) = client.pictures(execution)
    expected = headless_picture(name)
    assert picture.shape == expected.shape
    assert np.abs(picture.astype(int) - expected).max() <= 1
