"""Writes the subgraph that newer versions of ComfyUI offer from this pack: text to image in one box.

    python -m cascade_nodes.tests.web.subgraph

Made of the example for the published files, which stays the one place for its settings and its files' addresses.
"""

from __future__ import annotations

import copy
import json
import uuid
from pathlib import Path
from typing import Any

from cascade_nodes.tests.web.examples import canvas_file, read

ROOT = Path(__file__).parents[2]
EXAMPLE = canvas_file("text_to_image_checkpoints")
SUBGRAPH = ROOT / "subgraphs" / "Stable Cascade.json"  # the file's name is what ComfyUI shows
ID = "3f0c2a52-7a1d-4e0c-9a57-5d0f4c5b1e10"
INPUT_NODE, OUTPUT_NODE = -10, -20  # ComfyUI's ids for a subgraph's two ends
# {input of the box: the widgets that it sets, as (class, widget)}
INPUTS = {
    "prompt": [("CascadeTextEncode", "positive")],
    "negative": [("CascadeTextEncode", "negative")],
    "width": [("CascadeEmptyLatent", "width")],
    "height": [("CascadeEmptyLatent", "height")],
    "seed": [("CascadePriorSampler", "seed"), ("CascadeDecoderSampler", "seed")],
}
DESCRIPTION = "Text to image with Stable Cascade: a prompt, a size and a seed in, the picture out."


def identifier(name: str) -> str:
    """Identifier of a part of the subgraph, the same whenever it is written."""
    return str(uuid.uuid5(uuid.UUID(ID), name))


def make() -> dict[str, Any]:
    """The subgraph as ComfyUI saves one: a workflow with a single node, and what is in it beside."""
    example = copy.deepcopy(read(EXAMPLE))
    left_out = {
        node["id"] for node in example["nodes"] if node["type"] in ("SaveImage", "MarkdownNote", "Note")
    }
    nodes = [node for node in example["nodes"] if node["id"] not in left_out]
    by_class = {node["type"]: node for node in nodes}
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    links: list[dict[str, Any]] = [dict(zip(keys, link, strict=True)) for link in example["links"]]
    decode = by_class["CascadeDecode"]
    for link in links:
        if link["target_id"] in left_out:
            assert link["origin_id"] == decode["id"]
            link.update(target_id=OUTPUT_NODE, target_slot=0)
    output_links = [link["id"] for link in links if link["target_id"] == OUTPUT_NODE]
    inputs = []
    for slot, (name, widgets) in enumerate(INPUTS.items()):
        link_ids = []
        for class_type, widget in widgets:
            target = by_class[class_type]
            place = next(place for place, entry in enumerate(target["inputs"]) if entry["name"] == widget)
            link = {"id": 1 + max(link["id"] for link in links), "origin_id": INPUT_NODE, "origin_slot": slot}
            link |= {"target_id": target["id"], "target_slot": place, "type": target["inputs"][place]["type"]}
            target["inputs"][place]["link"] = link["id"]
            links.append(link)
            link_ids.append(link["id"])
        entry = {"id": identifier(name), "name": name, "type": links[-1]["type"], "linkIds": link_ids}
        inputs.append({**entry, "pos": [-140, 20 * slot]})
    right = max(node["pos"][0] + node["size"][0] for node in nodes)
    output = {"id": identifier("image"), "name": "image", "type": "IMAGE", "linkIds": output_links}
    subgraph = {
        "id": ID,
        "version": 1,
        "state": {
            "lastGroupId": len(example["groups"]),
            "lastNodeId": max(node["id"] for node in nodes),
            "lastLinkId": max(link["id"] for link in links),
            "lastRerouteId": 0,
        },
        "revision": 0,
        "config": {},
        "name": SUBGRAPH.stem,
        "description": DESCRIPTION,
        "category": "Stable Cascade",
        "inputNode": {"id": INPUT_NODE, "bounding": [-260, -20, 120, 140]},
        "outputNode": {"id": OUTPUT_NODE, "bounding": [right + 80, -20, 120, 60]},
        "inputs": inputs,
        "outputs": [{**output, "pos": [right + 100, 0]}],
        "widgets": [],
        "nodes": nodes,
        "groups": [group for group in example["groups"] if group["bounding"][0] < right],
        "links": links,
        "extra": {},
    }
    box = {
        "id": max(node["id"] for node in nodes) + 1,
        "type": ID,
        "pos": [0, 0],
        "size": [400, 420],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [
            {"name": entry["name"], "type": entry["type"], "widget": {"name": entry["name"]}, "link": None}
            for entry in inputs
        ],
        "outputs": [{"name": output["name"], "type": output["type"], "links": None}],
        "properties": {},
        "widgets_values": [],
    }
    return {
        "id": identifier("workflow"),
        "revision": 0,
        "last_node_id": box["id"],
        "last_link_id": 0,
        "nodes": [box],
        "links": [],
        "groups": [],
        "definitions": {"subgraphs": [subgraph]},
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def text() -> str:
    """The file."""
    return json.dumps(make(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SUBGRAPH.parent.mkdir(exist_ok=True)
    SUBGRAPH.write_text(text(), encoding="utf-8")
