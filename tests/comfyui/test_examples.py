"""The example workflows make the same picture in ComfyUI as without it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cascade_nodes.tests.comfyui.graphs import PRIOR

EXAMPLES = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((Path(__file__).parents[2] / "example_workflows" / "api").glob("*.json"))
}


def files(graph):
    """{(node, input): file} of all loaders in a graph."""
    return {
        (node_id, input_id): node["inputs"][input_id]
        for node_id, node in graph.items()
        for input_id in ("file", "previewer")
        if input_id in node["inputs"]
    }


def uses_the_demo(name):
    return all(file.startswith("demo_") for file in files(EXAMPLES[name]).values())


@pytest.mark.parametrize("name", [name for name in EXAMPLES if uses_the_demo(name)])
def test_same_picture_as_without_comfyui(client, right_picture, name):
    execution = client.run(EXAMPLES[name])
    assert execution.error is None
    (picture,) = client.pictures(execution)
    expected = right_picture(EXAMPLES[name])
    assert picture.shape == expected.shape
    assert np.abs(picture.astype(int) - expected).max() <= 1
    # The last preview is Stage B's last step, the middle one Stage C's: what the picture shows, in its colours.
    stage_c = EXAMPLES[name][PRIOR]["inputs"]["steps"]
    for preview, difference in ((execution.previews[stage_c - 1], 8), (execution.previews[-1], 2)):
        shown = Image.fromarray(preview).resize((picture.shape[1], picture.shape[0]))
        assert np.abs(np.asarray(shown).astype(int) - picture).mean() <= difference


@pytest.mark.parametrize("name", [name for name in EXAMPLES if not uses_the_demo(name)])
def test_an_example_of_published_files_lacks_nothing_but_these(client, name):
    status, answer = client.post("/prompt", {"prompt": EXAMPLES[name]})
    assert status == 400
    missing = {
        (node_id, error["extra_info"]["input_name"]): error["details"]
        for node_id, entry in answer["node_errors"].items()
        for error in entry["errors"]
    }
    assert missing.keys() == files(EXAMPLES[name]).keys()
    for place, file in files(EXAMPLES[name]).items():
        assert f" file {file!r} was found in " in missing[place]
