"""The example workflows make the same pictures in ComfyUI as without it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cascade_nodes.nodes.hosts.previews import INTERVAL, PAUSE
from cascade_nodes.tests.headless.record_comfyui import node

EXAMPLES = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((Path(__file__).parents[2] / "example_workflows" / "api").glob("*.json"))
}


def files(graph):
    """{(node, input): file} of all loaders in a graph."""
    return {
        (node_id, input_id): entry["inputs"][input_id]
        for node_id, entry in graph.items()
        for input_id in ("file", "previewer")
        if input_id in entry["inputs"]
    }


def uses_the_demo(name):
    return all(file.startswith("demo_") for file in files(EXAMPLES[name]).values())


@pytest.fixture
def previews_at_every_step(client):
    def wait(interval, pause):
        assert client.run({"1": node("PreviewInterval", interval=interval, pause=pause)}).error is None

    wait(0, 0)
    yield
    wait(INTERVAL, PAUSE)


@pytest.mark.usefixtures("previews_at_every_step")
@pytest.mark.parametrize("name", [name for name in EXAMPLES if uses_the_demo(name)])
def test_same_pictures_as_without_comfyui(client, right_pictures, name):
    execution = client.run(EXAMPLES[name])
    assert execution.error is None
    pictures, expected = client.pictures(execution), right_pictures(EXAMPLES[name])
    assert [picture.shape for picture in pictures] == [picture.shape for picture in expected]
    for picture, right in zip(pictures, expected, strict=True):
        assert np.abs(picture.astype(int) - right).max() <= 1
    # The last preview is Stage B's last step, and Stage C's comes before: what the picture shows, in its colours, at
    # most 256 pixels a side.
    # Of a masked run it is less exact: outside the mask it shows what the sampler is about to put the source over.
    pasted = any(entry["class_type"] == "CascadeInpaintComposite" for entry in EXAMPLES[name].values())
    large = max(pictures[0].shape) > 256
    previews = [(execution.previews[-1], 4 if pasted else 3 if large else 2)]
    for entry in EXAMPLES[name].values():
        if entry["class_type"] == "CascadePriorSampler":
            previews.append((execution.previews[entry["inputs"]["steps"] - 1], 8))
    for preview, difference in previews:
        preview_image = Image.fromarray(preview).resize((pictures[0].shape[1], pictures[0].shape[0]))
        assert np.abs(np.asarray(preview_image).astype(int) - pictures[0]).mean() <= difference


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
