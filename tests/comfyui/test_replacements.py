"""Our nodes in place of ComfyUI's own for Stable Cascade: the table, versions that replace nodes by it, and the
settings that docs/from-comfyui.md gives for the same picture.
"""

import copy
import json
from pathlib import Path
from urllib.error import HTTPError

import numpy as np
import pytest

from cascade_nodes.tests.comfyui.checkout import CHECKOUTS, PACK, Server
from cascade_nodes.tests.comfyui.client import Client
from cascade_nodes.tests.comfyui.conftest import prepare
from cascade_nodes.tests.comfyui.graphs import tiny
from cascade_nodes.tests.headless.record_comfyui import node

TABLE = json.loads((PACK / "web" / "replacements.json").read_text(encoding="utf-8"))
WITHOUT = '''"""ComfyUI as it may come one day: without its nodes for Stable Cascade."""

import nodes

for name in [name for name in nodes.NODE_CLASS_MAPPINGS if name.startswith("StableCascade_")]:
    del nodes.NODE_CLASS_MAPPINGS[name]
NODE_CLASS_MAPPINGS = {}
'''


def entries(info, *kinds):
    """{input: its entry} of a node in /object_info."""
    return {name: entry for kind in kinds for name, entry in info["input"].get(kind, {}).items()}


@pytest.mark.parametrize("row", TABLE, ids=[row["old_node_id"] for row in TABLE])
def test_the_table_says_what_both_nodes_have(server, row):
    nodes = server.get("/object_info")
    old, new = nodes[row["old_node_id"]], nodes[row["new_node_id"]]
    old_inputs, new_inputs = entries(old, "required", "optional"), entries(new, "required", "optional")
    mapped = {entry["new_id"]: entry for entry in row["input_mapping"]}
    assert entries(new, "required").keys() <= mapped.keys() <= new_inputs.keys()
    for name, entry in mapped.items():
        if "old_id" in entry:
            assert old_inputs[entry["old_id"]][0] == new_inputs[name][0]
    # Values in a saved workflow are told apart by their places.
    assert row["old_widget_ids"] == [
        name for name in old["input_order"]["required"] if old_inputs[name][0] == "INT"
    ]
    for entry in row["output_mapping"]:
        assert old["output"][entry["old_idx"]] == new["output"][entry["new_idx"]]
    assert len(row["output_mapping"]) == len(old["output"]) == len(new["output"])


def native(graph):
    """A graph of ours with ComfyUI's empty latent in place of ours."""
    graph = copy.deepcopy(graph)
    (entry,) = (entry for entry in graph.values() if entry["class_type"] == "CascadeEmptyLatent")
    sizes = {name: entry["inputs"][name] for name in ("width", "height", "batch_size")}
    entry.update(
        class_type="StableCascade_EmptyLatentImage",
        inputs={**sizes, "compression": 42},
        _meta={"title": "size"},
    )
    return graph


def test_a_graph_with_nodes_that_are_gone_makes_the_same_picture(
    checkout, servers, tmp_path: Path, right_picture
):
    """Newer versions replace nodes by the table that the pack registers; 0.3.64 has no list of replacements."""
    if checkout != CHECKOUTS[-1]:
        with pytest.raises(HTTPError, match="404"):
            servers(checkout).get("/node_replacements")
        return
    base = prepare(tmp_path)
    (base / "custom_nodes" / "without.py").write_text(WITHOUT, encoding="utf-8")
    graph = tiny({})
    with Server(checkout, base) as server, Client(server) as client:
        assert {row["old_node_id"]: [row] for row in TABLE}.items() <= server.get(
            "/node_replacements"
        ).items()
        execution = client.run(native(graph))
        assert execution.error is None
        (picture,) = client.pictures(execution)
        assert np.abs(picture.astype(int) - right_picture(graph)).max() <= 1


SIDE = 256  # the smallest of ComfyUI's own empty latent
KSAMPLER = {"sampler_name": "ddim", "scheduler": "simple", "denoise": 1.0}
OURS = {"sampler": "ddim", "cfg_rescale": 0.0}  # as the page says, with shift 2 and 1


def test_the_settings_of_the_page_give_the_same_picture(client):
    """Loaders are ours in both graphs: ComfyUI's own do not read networks as narrow as the tests'."""
    sizes = {"6.width": SIDE, "6.height": SIDE, "7.steps": 8, "8.steps": 4}
    samplers = {f"{place}.{name}": value for place in "78" for name, value in OURS.items()}
    ours = tiny({**sizes, **samplers, "7.shift": 2.0, "8.shift": 1.0})
    prior, decoder = ours["7"]["inputs"], ours["8"]["inputs"]
    theirs = {
        **ours,
        "5": node("CLIPTextEncode", clip=["4", 0], text=ours["5"]["inputs"]["positive"]),
        "50": node("CLIPTextEncode", clip=["4", 0], text=ours["5"]["inputs"]["negative"]),
        "6": node("StableCascade_EmptyLatentImage", width=SIDE, height=SIDE, compression=42, batch_size=1),
        "7": node(
            "KSampler", **KSAMPLER, **{name: prior[name] for name in ("model", "seed", "steps", "cfg")},
            positive=["5", 0], negative=["50", 0], latent_image=["6", 0],
        ),
        "70": node("StableCascade_StageB_Conditioning", conditioning=["5", 0], stage_c=["7", 0]),
        "8": node(
            "KSampler", **KSAMPLER, **{name: decoder[name] for name in ("model", "seed", "steps", "cfg")},
            positive=["70", 0], negative=["50", 0], latent_image=["6", 1],
        ),
        "9": node("VAEDecode", vae=["3", 0], samples=["8", 0]),
    }  # fmt: skip
    pictures = []
    for graph in (theirs, ours):
        execution = client.run(graph)
        assert execution.error is None
        pictures.append(client.pictures(execution)[0].astype(int))
    difference = np.abs(pictures[0] - pictures[1])
    assert difference.mean() <= 1
    assert np.abs(pictures[0] - np.roll(pictures[0], 8)).mean() > 5  # it is not one colour


def test_the_page_names_every_node_of_the_table():
    page = (PACK / "docs" / "from-comfyui.md").read_text(encoding="utf-8")
    for row in TABLE:
        assert f"`{row['old_node_id']}`" in page
