"""The shipped text-to-image graph with the tiny networks, so that a prompt takes a moment, and changes to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cascade_nodes.tests.headless.record_comfyui import node

EXAMPLE = Path(__file__).parents[2] / "example_workflows" / "api" / "text_to_image.json"
PRIOR, DECODER, SAVE = "7", "8", "10"
TINY = {
    "1.file": "tiny_stage_c.safetensors", "2.file": "tiny_stage_b.safetensors", "3.file": "tiny_stage_a.safetensors",
    "4.file": "tiny_text_encoder", "5.positive": "a (red:1.2) star", "6.width": 64, "6.height": 64,
    "7.steps": 3, "8.steps": 3,
}  # fmt: skip


def demo(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The shipped graph; `changes` are new values of inputs, such as {"7.steps": 3}, or whole nodes, by their id."""
    graph = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    for place, value in (changes or {}).items():
        node_id, _, input_id = place.partition(".")
        if input_id:
            graph[node_id]["inputs"][input_id] = value
        else:
            graph[node_id] = value
    return graph


def tiny(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The shipped graph with the tiny networks and few steps."""
    return demo({**TINY, **(changes or {})})


def compress(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """A picture encoded for Stage C, and shown again by the previewer, beside the tiny graph."""
    files = {"file": "tiny_compressor.safetensors", "previewer": "tiny_previewer.safetensors"}
    nodes = {
        "11": node("CascadeCompressorLoader", **files),
        "12": node("CascadeEncode", vae=["11", 0], image=["9", 0], compression=32.0),
        "13": node("CascadeDecode", vae=["11", 0], samples=["12", 0], tile_size=0),
        "14": node("PreviewImage", images=["13", 0]),
    }
    return tiny({**nodes, **(changes or {})})
