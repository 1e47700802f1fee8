"""Graphs that cannot run are refused by ComfyUI, node by node, as they are without it."""

import json

import pytest

from cascade_nodes.headless.builtin import BUILTIN_NODES
from cascade_nodes.headless.registry import by_id
from cascade_nodes.headless.validation import validate
from cascade_nodes.nodes.extension import NODES
from cascade_nodes.tests.comfyui.graphs import tiny
from cascade_nodes.tests.headless.record_comfyui import canonical, node

# Not here: a link to a node that is not there, where ComfyUI says no more than KeyError, and we what is wrong.
GRAPHS = {
    "a VAE for a MODEL": tiny({"7.model": ["3", 0]}),
    "a LATENT for a CONDITIONING": tiny({"7.positive": ["6", 0]}),
    "a MODEL for a VAE": tiny({"9.vae": ["1", 0]}),
    "a broken link": tiny({"7.model": ["1"]}),
    "a word for a number": tiny({"7.steps": "many"}),
    "a word for a size": tiny({"6.width": "wide"}),
    "no steps": tiny({"7.steps": 0}),
    "too many steps": tiny({"8.steps": 10_001}),
    "cfg too large": tiny({"7.cfg": 1e6}),
    "denoise above 1": tiny({"8.denoise": 1.5}),
    "a seed beyond 64 bits": tiny({"8.seed": 2**64}),
    "an absurd size": tiny({"6.width": 99_999}),
    "absurd sizes": tiny({"6.width": 10**9, "6.height": -64}),
    "no size": tiny({"6.width": 0}),
    "no multiple of 8": tiny({"6.width": 100}),
    "an absurd batch": tiny({"6.batch_size": 10**6}),
    "compression too small": tiny({"6.compression": 0.1}),
    "several nodes": tiny({"7.steps": 0, "8.cfg": -1, "6.height": 7}),
    "no output": {key: value for key, value in tiny().items() if key != "10"},
    "a good output beside a bad one": tiny(
        {
            "20": node("CascadeDecode", vae=["3", 0], samples=["6", 1], tile_size=-1),
            "21": node("PreviewImage", images=["20", 0]),
        }
    ),
}
for input_id in ("model", "positive", "latent", "seed"):
    GRAPHS[f"without {input_id}"] = tiny()
    del GRAPHS[f"without {input_id}"]["7"]["inputs"][input_id]


@pytest.mark.parametrize("name", GRAPHS)
def test_same_node_errors_as_without_comfyui(client, server, monkeypatch, name):
    monkeypatch.setenv("CASCADE_MODELS", str(server.base / "models"))
    graph = GRAPHS[name]
    status, answer = client.post("/prompt", {"prompt": graph, "client_id": client.id})
    validation = validate(graph, by_id([*NODES, *BUILTIN_NODES]))
    expected = canonical({"error": validation.error, "outputs": [], "node_errors": validation.node_errors})
    answered = canonical({"error": answer.get("error"), "outputs": [], "node_errors": answer["node_errors"]})
    assert status == (400 if validation.error else 200)
    assert json.loads(json.dumps(answered)) == json.loads(json.dumps(expected))
    if status == 200:
        client.follow(answer["prompt_id"])


@pytest.mark.parametrize(
    ("place", "name", "said"),
    [
        ("1.file", "gone.safetensors", "No Stage C file 'gone.safetensors' was found in "),
        ("2.file", "gone.safetensors", "No Stage B file 'gone.safetensors' was found in "),
        ("3.file", "gone.safetensors", "No Stage A file 'gone.safetensors' was found in "),
        ("4.file", "gone", "No text encoder file 'gone' was found in "),
        ("1.file", "", "No Stage C file is chosen; choose one in the loader."),
        ("1.file", "../secret.safetensors", "'../secret.safetensors' is not the name of a model file; "),
        ("1.file", "/etc/passwd", "'/etc/passwd' is not the name of a model file; "),
    ],
)
def test_a_file_that_is_not_there_is_refused_before_anything_runs(client, place, name, said):
    node_id, input_id = place.split(".")
    status, answer = client.post("/prompt", {"prompt": tiny({place: name})})
    assert status == 400
    assert list(answer["node_errors"]) == [node_id]
    (error,) = answer["node_errors"][node_id]["errors"]
    assert error["type"] == "custom_validation_failed"
    assert error["extra_info"]["input_name"] == input_id
    assert said in error["details"]
