"""Every form in which a graph comes: API format, a body of POST /prompt, a workflow of the canvas, pictures."""

import copy
import json

import pytest
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo

from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.headless import embedded, run_graph
from cascade_nodes.headless.cli import main
from cascade_nodes.headless.registry import available_nodes, describe
from cascade_nodes.headless.results import Observer
from cascade_nodes.headless.sources import Source, prepared, read_source
from cascade_nodes.tests.headless.pictured import save_picture
from cascade_nodes.tests.headless.record_comfyui import node
from cascade_nodes.tests.web.examples import TITLES, api_file, canvas_file, read

COPY = {
    "1": node("LoadImage", image="in.png"),
    "2": node("SaveImage", images=["1", 0], filename_prefix="out"),
}
CANVAS = {
    "nodes": [
        {"id": 1, "type": "LoadImage", "mode": 0, "widgets_values": ["in.png", "image"], "inputs": []},
        {
            "id": 2,
            "type": "SaveImage",
            "inputs": [{"name": "images", "type": "IMAGE", "link": 7}],
            "widgets_values": ["out"],
        },
        {"id": 3, "type": "Note", "widgets_values": ["hello"]},
    ],
    "links": [[7, 1, 0, 2, 0, "IMAGE"]],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (6, 4), "blue").save("in.png")
    return tmp_path


def nothing_known(class_type):
    return None


def known(class_type):
    nodes = available_nodes()
    return describe(nodes[class_type]).inputs if class_type in nodes else None


def inside(path):
    return embedded.embedded_texts(path)[0]


def refusal(path, inputs_of=known):
    with pytest.raises(CascadeError) as caught:
        read_source(path, inputs_of)
    message = str(caught.value)
    assert all(line.isprintable() for line in message.splitlines())
    return message


KINDS = ["a.png", "a.webp", "a.jpg", *(["a.avif"] if features.check("avif") else [])]


@pytest.mark.parametrize("name", KINDS)
def test_a_picture_runs_and_what_it_makes_runs_again(folder, name, capsys):
    save_picture(folder / name, prompt=COPY, workflow=CANVAS)
    assert main(["run", name]) == 0
    made = folder / "output" / "out_00001_.png"
    assert capsys.readouterr().out.startswith("output/out_00001_.png  (")
    assert {key: json.loads(text) for key, text in inside(made).items()} == {
        "prompt": COPY,
        "workflow": CANVAS,
    }
    assert main(["run", str(made), "--set", "2.filename_prefix=again"]) == 0
    # Its values differ from the workflow's, which ComfyUI would open instead.
    assert inside(folder / "output" / "again_00001_.png").keys() == {"prompt"}


def test_chunks_behind_the_pixels(folder):
    save_picture(folder / "a.png", after=True, prompt=COPY)
    assert read_source(folder / "a.png", nothing_known) == Source(COPY)


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_a_picture_with_a_workflow_alone(folder, name, capsys):
    save_picture(folder / name, workflow=CANVAS)
    assert main(["run", name]) == 0
    assert json.loads(inside(folder / "output" / "out_00001_.png")["prompt"]) == COPY


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({}, "a.png holds no graph; choose a picture that ComfyUI or cascade saved"),
        ({"parameters": "a star\nSteps: 2"}, "a.png holds no graph"),
        ({"prompt": "a red star"}, "a.png holds no graph"),  # another program's words
        ({"prompt": "{" * 100_000}, "a.png holds no graph"),
        ({"prompt": [1]}, "a.png holds no graph"),
        ({"prompt": {"1": 5}}, "a.png (its prompt): node 1 is a number, but an object was expected."),
        (
            {"workflow": {"nodes": [5]}},
            "a.png (its workflow) has nodes and links, but not as ComfyUI's canvas",
        ),
        ({"workflow": {"nodes": [], "links": {}}}, "a.png (its workflow) holds no nodes."),
        (
            {"workflow": {"nodes": [{"id": "\x1b", "type": "Odd\x1b"}]}},
            r"with a node 'Odd\x1b' (id '\x1b'), which is not known here; run with --server",
        ),
    ],
)
def test_pictures_without_a_graph(folder, texts, words):
    assert words in refusal(save_picture(folder / "a.png", **texts))


def test_a_text_that_unpacks_to_far_more_is_refused(folder):
    picture = Image.new("RGB", (6, 4))
    chunks = PngInfo()
    chunks.add_text("prompt", " " * 2**28, zip=True)
    picture.save(folder / "a.png", pnginfo=chunks)
    assert (folder / "a.png").stat().st_size < 2**20
    assert "a.png cannot be read: Decompressed data too large" in refusal(folder / "a.png")


def test_a_body_of_post_prompt(folder):
    body = {
        "prompt": COPY,
        "client_id": "a",
        "extra_data": {"extra_pnginfo": {"workflow": CANVAS, "other": 1}},
    }
    (folder / "body.json").write_text(json.dumps(body))
    assert main(["run", "body.json"]) == 0
    texts = inside(folder / "output" / "out_00001_.png")
    assert {key: json.loads(text) for key, text in texts.items()} == {"prompt": COPY, "workflow": CANVAS}
    assert read_source(folder / "body.json", nothing_known) == Source(COPY, CANVAS)
    for extra in ({}, {"extra_data": 5}, {"extra_data": {"extra_pnginfo": {"workflow": [1]}}}):
        (folder / "body.json").write_text(json.dumps({"prompt": COPY, **extra}))
        assert read_source(folder / "body.json", nothing_known) == Source(COPY)
    run_graph(body, output_folder=folder / "again")


def test_a_node_may_be_called_prompt(folder):
    graph = {"prompt": COPY["1"], "2": node("SaveImage", images=["prompt", 0], filename_prefix="out")}
    (folder / "graph.json").write_text(json.dumps(graph))
    assert read_source(folder / "graph.json", nothing_known) == Source(graph)


# Workflows of the canvas


def values_of(graph):
    return {node_id: (entry["class_type"], entry["inputs"]) for node_id, entry in graph.items()}


@pytest.mark.parametrize("name", TITLES)
def test_examples_for_the_canvas_become_those_for_the_command_line(name):
    source = read_source(canvas_file(name), known)
    api = read(api_file(name))
    assert values_of(source.graph) == values_of(api)


def canvas(**changes):
    """CANVAS with other nodes between its two, each by (id, type, mode, input's link), and links to them."""
    workflow = copy.deepcopy(CANVAS)
    workflow["nodes"] += changes.get("nodes", [])
    workflow["links"] = changes.get("links", workflow["links"])
    return workflow


def between(kind, mode=0, node_id=4):
    sockets = [{"name": "other", "type": "MASK", "link": None}, {"name": "x", "type": "IMAGE", "link": 8}]
    return {
        "id": node_id,
        "type": kind,
        "mode": mode,
        "inputs": sockets if mode else sockets[1:],
        "outputs": [{"name": "y", "type": "IMAGE"}],
    }


def graph_of(workflow, path):
    path.write_text(json.dumps(workflow))
    return read_source(path, known).graph


def test_reroutes_bypassed_and_muted_nodes(tmp_path):
    path = tmp_path / "w.json"
    links = [[8, 1, 0, 4, 0, "IMAGE"], [7, 4, 0, 2, 0, "IMAGE"]]
    straight = values_of(COPY)
    assert values_of(graph_of(canvas(nodes=[between("Reroute")], links=links), path)) == straight
    assert values_of(graph_of(canvas(nodes=[between("Unknown", 4)], links=links), path)) == straight
    cut = graph_of(canvas(nodes=[between("Unknown", 2)], links=links), path)
    assert cut["2"]["inputs"] == {"filename_prefix": "out"}
    circle = [[8, 4, 0, 4, 0, "IMAGE"], [7, 4, 0, 2, 0, "IMAGE"]]
    assert "images" not in graph_of(canvas(nodes=[between("Reroute")], links=circle), path)["2"]["inputs"]
    assert "images" not in graph_of(canvas(links=[]), path)["2"]["inputs"]


def test_links_as_objects_primitives_and_values_by_name(tmp_path):
    link = {"id": 7, "origin_id": 1, "origin_slot": 0, "target_id": 2, "target_slot": 0, "type": "IMAGE"}
    text = {**link, "id": 9, "origin_id": 5, "target_slot": 1, "type": "STRING"}
    workflow = canvas(nodes=[{"id": 5, "type": "PrimitiveNode", "widgets_values": ["in words", "fixed"]}])
    workflow["links"] = [link, text]
    workflow["nodes"][0]["widgets_values"] = {"image": "in.png"}
    workflow["nodes"][1]["inputs"].append({"name": "filename_prefix", "widget": {"name": "f"}, "link": 9})
    workflow["nodes"][1]["title"] = "Result"
    graph = graph_of(workflow, tmp_path / "w.json")
    assert graph["1"]["inputs"] == {"image": "in.png"}
    assert graph["2"] == node("SaveImage", "Result", filename_prefix="in words", images=["1", 0])


def test_widgets_that_are_newer_than_the_workflow_have_their_defaults(tmp_path):
    workflow = {"nodes": [{"id": 1, "type": "CascadePriorSampler", "widgets_values": [5, "randomize", 12]}]}
    inputs = graph_of(workflow, tmp_path / "w.json")["1"]["inputs"]
    assert inputs["seed"] == 5
    assert inputs["steps"] == 12
    assert inputs["sampler"] == "ddpm"
    assert inputs["engine"] is True


# Seeds


class Drawn(Observer):
    def __init__(self):
        self.seeds = []

    def seed_drawn(self, seed):
        self.seeds.append(seed)


SEEDS = {
    "1": node("A", seed=3, steps=4),
    "2": node("B", noise_seed="random", text="random"),
    "3": node("C", seed=["1", 0]),
}


def seeds(*assignments):
    drawn = Drawn()
    graph = prepared(Source(SEEDS, CANVAS), assignments, nothing_known, drawn)
    return graph, drawn.seeds


def test_a_random_seed_is_drawn_once_and_told():
    source, (seed,) = seeds()
    assert 0 <= seed < 2**50
    assert source.graph["1"] == SEEDS["1"]
    assert source.graph["2"]["inputs"] == {"noise_seed": seed, "text": "random"}
    assert source.workflow is None
    assert SEEDS["2"]["inputs"]["noise_seed"] == "random"
    assert seeds()[1] != [seed]


def test_one_seed_for_all_samplers():
    source, (seed,) = seeds("seed=random")
    values = [entry["inputs"] for entry in source.graph.values()]
    assert values == [
        {"seed": seed, "steps": 4},
        {"noise_seed": seed, "text": "random"},
        {"seed": ["1", 0]},
    ]
    source, drawn = seeds("seed=7", "1.seed=8")
    assert not drawn
    assert source.graph["1"]["inputs"]["seed"] == 8
    assert source.graph["2"]["inputs"]["noise_seed"] == 7
    assert source.graph["3"] == SEEDS["3"]


def test_a_graph_without_a_seed():
    with pytest.raises(CascadeError, match=r"^The graph has no seed to set; name the node and its input"):
        prepared(Source(COPY), ["seed=random"], nothing_known, Drawn())


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("f2fdebf6-dfaf-43b6-9eb2-7f70613cfdc1", "the subgraph 'Text to image'"),
        ("workflow>Loaders", "the group node 'Loaders'"),
        ("workflow/Loaders", "the group node 'Loaders'"),
    ],
)
def test_groups_of_the_canvas_are_named(kind, named, folder):
    """No server knows them, so that --server would not help."""
    workflow = copy.deepcopy(CANVAS)
    workflow["nodes"].append({"id": 9, "type": kind, "mode": 0})
    subgraph = {
        "id": "f2fdebf6-dfaf-43b6-9eb2-7f70613cfdc1",
        "name": "Text to image",
        "nodes": [],
        "links": [],
    }
    workflow["definitions"] = {"subgraphs": [subgraph]}
    (folder / "a.json").write_text(json.dumps(workflow))
    assert refusal(folder / "a.json").endswith(
        f"with {named} (id 9), which only the canvas can expand; there, choose File > Export (API) and run that file."
    )


def test_weights_are_no_graph(folder):
    (folder / "a.gguf").write_bytes(b"GGUF")
    assert "has the name of a file of weights, which holds no graph; give a graph or a picture" in refusal(
        folder / "a.gguf"
    )
