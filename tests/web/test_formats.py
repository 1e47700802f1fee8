"""The example graphs: both formats of each say the same, and each can be made from the other."""

import copy

import pytest
from PIL import Image

from cascade_nodes.headless.catalogue import FILES
from cascade_nodes.tests.web import subgraph
from cascade_nodes.tests.web.examples import (
    EXAMPLES,
    FOR_THE_COMMAND_LINE,
    TITLES,
    api_file,
    canvas_file,
    read,
)
from cascade_nodes.tests.web.formats import layout_of, schemas, to_api, to_ui
from cascade_nodes.tests.web.lay_out import lay_out

NAMES = sorted(TITLES)
PUBLISHED = {(file.saved_as, file.folder): file for file in FILES.values()}


@pytest.fixture(scope="module")
def nodes():
    return schemas()


def test_every_example_is_there_twice_and_has_a_picture():
    assert {path.stem for path in EXAMPLES.glob("*.json")} == set(TITLES.values())
    assert {path.stem for path in (EXAMPLES / "api").glob("*.json")} == {*NAMES, FOR_THE_COMMAND_LINE}
    for name in NAMES:
        with Image.open(canvas_file(name).with_suffix(".jpg")) as thumbnail:
            assert thumbnail.format == "JPEG"
            assert max(thumbnail.size) <= 800


@pytest.mark.parametrize("name", NAMES)
def test_the_graph_converts_to_the_prompt(name, nodes):
    assert to_api(read(canvas_file(name)), nodes) == read(api_file(name))


@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_converts_to_the_graph(name, nodes):
    graph = read(canvas_file(name))
    assert to_ui(read(api_file(name)), nodes, layout_of(graph)) == graph


def test_what_cannot_be_converted_is_refused(nodes):
    graph = read(canvas_file("text_to_image"))
    graph["nodes"][0]["mode"] = 4
    with pytest.raises(ValueError, match=r"node 1 .* bypassed"):
        to_api(graph, nodes)


@pytest.mark.parametrize("name", NAMES)
def test_nodes_lie_in_groups_and_on_no_other(name):
    graph = read(canvas_file(name))
    title = 30  # pixels above a node's place
    boxes = {
        node["id"]: (x, y - title, x + width, y + height)
        for node in graph["nodes"]
        for (x, y), (width, height) in [(node["pos"], node["size"])]
    }
    groups = [
        (x, y, x + width, y + height) for x, y, width, height in (g["bounding"] for g in graph["groups"])
    ]
    for box_node, (left, top, right, bottom) in boxes.items():
        inside = [g for g in groups if g[0] <= left and g[1] <= top and right <= g[2] and bottom <= g[3]]
        assert len(inside) == 1, f"node {box_node} lies in {len(inside)} groups"
        for other_node, (x0, y0, x1, y1) in boxes.items():
            apart = right <= x0 or x1 <= left or bottom <= y0 or y1 <= top
            assert box_node == other_node or apart, f"nodes {box_node} and {other_node} overlap"


@pytest.mark.parametrize("name", NAMES)
def test_nodes_have_the_room_that_both_kinds_of_nodes_take(name):
    graph = read(canvas_file(name))
    again = copy.deepcopy(graph)
    lay_out(again)
    assert again == graph, "run python -m cascade_nodes.tests.web.lay_out"


@pytest.mark.parametrize("name", NAMES)
def test_models_are_those_of_the_catalogue(name):
    for node in read(canvas_file(name))["nodes"]:
        for model in node["properties"].get("models", []):
            file = PUBLISHED[model["name"], model["directory"]]
            assert model["url"].endswith(f"/{model['name']}")  # as a browser saves it
            assert model["url"] == f"https://huggingface.co/{file.repo}/resolve/main/{file.path}"
            assert model["name"] == node["widgets_values"][0]
    published = [node for node in read(canvas_file(name))["nodes"] if node["properties"].get("models")]
    assert len(published) == (2 if name == "text_to_image_checkpoints" else 0)


@pytest.mark.parametrize("box", subgraph.BOXES, ids=lambda box: box.example)
def test_a_subgraph_is_written_from_its_example(box):
    """After a change of its example: python -m cascade_nodes.tests.web.subgraph"""
    assert box.path.read_text(encoding="utf-8") == subgraph.text(box)
