"""Lays the example graphs out: `python -m cascade_nodes.tests.web.lay_out`.

In each group its nodes stand one below another in the order they have, as high as they are in the interface that draws
them higher, classic or Nodes 2.0, and notes as high as their text. To be called after a graph or a note was changed.
"""

from __future__ import annotations

import json
from math import ceil
from typing import Any

from cascade_nodes.cascade_core.writing import write_file
from cascade_nodes.tests.web.examples import TITLES, canvas_file

TITLE, GAP, BORDER = 30, 24, 20  # pixels: a node's title, between nodes, around them in a group
HEAD = 60  # a group's title, above the titles of its first nodes
# Heights without the title, of the higher kind of nodes, with a picture's of 256 × 256 where samplers show one.
HEIGHTS = {
    "StageCLoader": 146, "StageBLoader": 146, "StageAVAE": 118, "CascadeTextEncoderLoader": 118,
    "CascadeCheckpointLoader": 214,
    "CascadeControlNetLoader": 94, "CascadeCompressorLoader": 122, "CascadeVisionLoader": 94, "LoadImage": 340,
    "CascadeCanny": 150, "PreviewImage": 330, "CascadeTextEncode": 300, "CascadeEmptyLatent": 300,
    "CascadeControlNetApply": 210, "CascadePriorSampler": 700, "CascadeDecoderSampler": 746, "CascadeDecode": 114,
    "CascadeInpaintHint": 114, "CascadeEncode": 365, "CascadeInpaintComposite": 134, "CascadeLoRAApply": 350,
    "CascadeImagePrompt": 134, "CascadeOutpaint": 226, "CascadeSuperResolutionHint": 260, "SaveImage": 480,
}  # fmt: skip
LETTER, LINE, NOTE = 6.0, 20, 44  # pixels of a note: of a letter, of a line, of its borders


def height_of(node: dict[str, Any]) -> int:
    """A node's height in pixels, without its title."""
    if node["type"] != "MarkdownNote":
        return HEIGHTS[node["type"]]
    letters = (node["size"][0] - NOTE) / LETTER
    paragraphs = node["widgets_values"][0].split("\n\n")
    lines = sum(ceil(len(paragraph) / letters) for paragraph in paragraphs) + len(paragraphs) - 1
    return NOTE + LINE * lines


def lay_out(graph: dict[str, Any]) -> None:
    """Places the nodes of a graph in its groups, side by side, and makes the groups as high as the highest."""
    bottom = 0
    for group in graph["groups"]:
        left, top, width, height = group["bounding"]
        columns: dict[float, list[dict[str, Any]]] = {}
        for node in graph["nodes"]:
            if left <= node["pos"][0] < left + width and top <= node["pos"][1] < top + height:
                columns.setdefault(node["pos"][0], []).append(node)
        for column in columns.values():
            y = 0
            for node in sorted(column, key=lambda entry: entry["pos"][1]):
                node["pos"] = [node["pos"][0], y]
                node["size"] = [node["size"][0], height_of(node)]
                y += node["size"][1] + TITLE + GAP
            bottom = max(bottom, y - TITLE - GAP)
    for group in graph["groups"]:
        left, _, width, _ = group["bounding"]
        group["bounding"] = [left, -HEAD - TITLE, width, bottom + BORDER + HEAD + TITLE]


def main() -> None:
    """Lays out every example, each written anew where it changed."""
    for path in map(canvas_file, TITLES):
        text = path.read_text(encoding="utf-8")
        graph = json.loads(text)
        lay_out(graph)
        if graph != json.loads(text):
            write_file(path, json.dumps(graph, ensure_ascii=False, indent=2) + "\n")


if __name__ == "__main__":
    main()
