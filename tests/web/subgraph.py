"""Writes the subgraphs that newer versions of ComfyUI offer from this pack: text to image in one box.

    python -m cascade_nodes.tests.web.subgraph

Made of the examples for the published files and for the demo's, which stay the one place for their settings and
addresses.
"""

from __future__ import annotations

import copy
import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade_nodes.tests.web.examples import canvas_file, read

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "subgraphs"
INPUT_NODE, OUTPUT_NODE = -10, -20  # ComfyUI's ids for a subgraph's two ends
# {input of the box: the widgets that it sets, as (class, widget)}
INPUTS = {
    "prompt": [("CascadeTextEncode", "positive")],
    "negative": [("CascadeTextEncode", "negative")],
    "width": [("CascadeEmptyLatent", "width")],
    "height": [("CascadeEmptyLatent", "height")],
    "seed": [("CascadePriorSampler", "seed"), ("CascadeDecoderSampler", "seed")],
}


@dataclass(frozen=True)
class Box:
    """A subgraph of the pack.

    name     that ComfyUI shows, and its file's
    example  that it is made of
    id       a UUID, by which graphs refer to it
    """

    name: str
    example: str
    id: str
    description: str

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.name}.json"

    def identifier(self, part: str) -> str:
        """Identifier of a part of the subgraph, the same whenever it is written."""
        return str(uuid.uuid5(uuid.UUID(self.id), part))


BOXES = (
    Box(
        "Stable Cascade",
        "text_to_image_checkpoints",
        "3f0c2a52-7a1d-4e0c-9a57-5d0f4c5b1e10",
        "Text to image with Stable Cascade: a prompt, a size and a seed in, the picture out.",
    ),
    Box(
        "Stable Cascade demo",
        "text_to_image",
        "6b7d6a0e-52c1-4b0e-8d43-1f4e9d0a7c21",
        "Text to image with the pack's own small cascade: a prompt, a size and a seed in, the picture out.",
    ),
)


def make(of: Box) -> dict[str, Any]:
    """A subgraph as ComfyUI saves one: a workflow with a single node, and what is in it beside."""
    example = copy.deepcopy(read(canvas_file(of.example)))
    left_out = {
        node["id"] for node in example["nodes"] if node["type"] in ("SaveImage", "MarkdownNote", "Note")
    }
    nodes = [node for node in example["nodes"] if node["id"] not in left_out]
    by_class = {node["type"]: node for node in nodes}
    for node in nodes:  # no picture in the docs is of a box's seed
        if "fixed" in node["widgets_values"]:
            node["widgets_values"][node["widgets_values"].index("fixed")] = "randomize"
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
        entry = {"id": of.identifier(name), "name": name, "type": links[-1]["type"], "linkIds": link_ids}
        inputs.append({**entry, "pos": [-140, 20 * slot]})
    right = max(node["pos"][0] + node["size"][0] for node in nodes)
    output = {"id": of.identifier("image"), "name": "image", "type": "IMAGE", "linkIds": output_links}
    subgraph = {
        "id": of.id,
        "version": 1,
        "state": {
            "lastGroupId": len(example["groups"]),
            "lastNodeId": max(node["id"] for node in nodes),
            "lastLinkId": max(link["id"] for link in links),
            "lastRerouteId": 0,
        },
        "revision": 0,
        "config": {},
        "name": of.name,
        "description": of.description,
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
        "type": of.id,
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
        "id": of.identifier("workflow"),
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


def text(of: Box) -> str:
    """Its file."""
    return json.dumps(make(of), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for box in BOXES:
        box.path.write_text(text(box), encoding="utf-8")
