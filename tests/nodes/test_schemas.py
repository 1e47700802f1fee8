"""The nodes' schemas: complete, loadable by the oldest host, and never changing what was released."""

import json
from pathlib import Path

import pytest

from cascade_nodes.cascade_core import limits
from cascade_nodes.nodes.extension import NODES
from cascade_nodes.nodes.hosts import roles

from .record_nodes import FROZEN, frozen_forms, lost

ROOT = Path(__file__).parents[2]
INFO = {info["name"]: info for info in (node.GET_NODE_INFO_V1() for node in NODES)}


def test_released_nodes_never_change():
    assert frozen_forms() == json.loads(FROZEN.read_text(encoding="utf-8"))


def test_only_what_saved_workflows_do_not_need_can_be_recorded():
    before = frozen_forms()
    now = json.loads(json.dumps(before))
    now["CascadeNew"] = now["CascadeDecode"]
    sampler = now["CascadePriorSampler"]["inputs"]["sampler"][2]
    sampler["options"] = ["heun", *sampler["options"]]
    assert lost(before, now) == []
    sampler["options"].remove("ddim")
    now["CascadeDecode"]["inputs"]["soft"] = ["BOOLEAN", "required", {}]
    del now["CascadeCanny"]
    assert lost(before, now) == [
        "CascadeCanny is gone",
        "CascadePriorSampler.sampler is not what it was",
        "CascadeDecode.soft is new and required",
    ]


@pytest.mark.parametrize(
    "name", ["seed", "steps", "cfg", "cfg_rescale", "shift", "denoise", "tile", "batch", "grow"]
)
def test_the_front_door_takes_what_the_nodes_offer(name):
    """What a node refuses is refused there, and the other way: one table for both."""
    bounds = getattr(limits, name.upper())
    input_id = {"tile": "tile_size", "batch": "batch_size"}.get(name, name)
    offered = [
        INFO[node]["input"][kind][input_id][1]
        for node in ("CascadePriorSampler", "CascadeDecoderSampler", "CascadeEmptyLatent", "CascadeEncode")
        for kind in INFO[node]["input"]
        if input_id in INFO[node]["input"][kind]
    ]
    assert offered
    assert {(options["min"], options["max"]) for options in offered} == {(bounds.least, bounds.most)}


@pytest.mark.parametrize("name", INFO)
def test_everything_is_explained(name):
    info = INFO[name]
    assert info["display_name"]
    assert info["category"].startswith("Stable Cascade/")
    assert info["description"].endswith(".")
    for kind in ("required", "optional"):
        for input_id, (_, options) in info["input"].get(kind, {}).items():
            assert options.get("tooltip"), f"{name}.{input_id} has no tooltip"
    assert all(info["output_tooltips"])


@pytest.mark.parametrize("node", NODES)
def test_execute_takes_what_the_schema_gives(node):
    ids = [entry.id for entry in node.GET_SCHEMA().inputs]
    code = node.execute.__func__.__code__
    parameter_names = code.co_varnames[1 : code.co_argcount]
    takes_more = bool(code.co_flags & 0x08)
    assert (
        list(parameter_names) == ids[: len(parameter_names)] if takes_more else list(parameter_names) == ids
    )


def test_every_role_names_its_folders():
    assert set(roles.FOLDERS) == set(roles.ROLE_WORDS)
    assert set(roles.DEMO_NAMES) <= set(roles.FOLDERS)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "example_workflows" / "api").glob("*.json")), ids=lambda path: path.stem
)
def test_the_examples_fit_the_schemas(path):
    graph = json.loads(path.read_text(encoding="utf-8"))
    for node in graph.values():
        if node["class_type"] not in INFO:  # one of ComfyUI's own
            continue
        inputs = INFO[node["class_type"]]["input"]
        declared = {**inputs["required"], **inputs.get("optional", {})}
        assert inputs["required"].keys() <= node["inputs"].keys() <= declared.keys()
        for input_id, value in node["inputs"].items():
            socket = declared[input_id][0]
            if isinstance(value, list) and graph[value[0]]["class_type"] in INFO:
                source = INFO[graph[value[0]]["class_type"]]
                assert source["output"][value[1]] == socket
