"""The shipped graph and what the tests of bad input put into it."""

import json
from pathlib import Path
from typing import Any

from cascade_nodes.tests.headless.record_comfyui import node

GRAPH = Path(__file__).parents[2] / "example_workflows" / "api" / "text_to_image.json"
TINY = [
    "1.file=tiny_stage_c.safetensors", "2.file=tiny_stage_b.safetensors", "3.file=tiny_stage_a.safetensors",
    "4.file=tiny_text_encoder", "6.width=64", "6.height=64", "7.steps=1", "8.steps=1",
]  # fmt: skip

# Every loader's input, by the kind of file it takes, and the graph that has it.
LOADERS = {
    "Stage C": ("1.file", "picture.json"),
    "Stage B": ("2.file", "picture.json"),
    "Stage A": ("3.file", "picture.json"),
    "text encoder": ("4.file", "picture.json"),
    "image encoder": ("11.file", "picture.json"),
    "semantic compressor": ("1.file", "compress.json"),
    "previewer": ("1.previewer", "compress.json"),
}
TINY_FILES = {
    "Stage C": "diffusion_models/tiny_stage_c.safetensors",
    "Stage B": "unet/tiny_stage_b.safetensors",
    "Stage A": "vae/tiny_stage_a.safetensors",
    "text encoder": "text_encoders/tiny_text_encoder/model.safetensors",
    "semantic compressor": "stable_cascade/tiny_compressor.safetensors",
    "previewer": "vae/tiny_previewer.safetensors",
    "image encoder": "clip_vision/tiny_vision.safetensors",
}


def graphs() -> dict[str, dict[str, Any]]:
    """Graphs by file name: two that have every loader between them, and a picture `in.png` as input."""
    picture = json.loads(GRAPH.read_text(encoding="utf-8"))
    picture["7"]["inputs"]["positive"] = ["13", 0]
    picture |= {
        "11": node("CascadeVisionLoader", file="tiny_vision.safetensors"),
        "12": node("LoadImage", image="in.png"),
        "13": node(
            "CascadeImagePrompt", conditioning=["5", 0], clip_vision=["11", 0], image=["12", 0], strength=1
        ),
    }
    files = {"file": "tiny_compressor.safetensors", "previewer": "tiny_previewer.safetensors"}
    compress = {
        "1": node("CascadeCompressorLoader", **files),
        "2": node("LoadImage", image="in.png"),
        "3": node("CascadeEncode", vae=["1", 0], image=["2", 0], compression=32),
        "4": node("CascadeDecode", vae=["1", 0], samples=["3", 0], tile_size=0),
        "5": node("SaveImage", images=["4", 0], filename_prefix="seen"),
    }
    return {"picture.json": picture, "compress.json": compress}


def command(graph: Path | str, *assignments: str, output: str = "output") -> list[str]:
    """Arguments of `cascade run` with these assignments, and with the tiny networks in the shipped graph."""
    options = [*assignments] if graph == "compress.json" else [*TINY, *assignments]
    return [
        "run",
        str(graph),
        "--output",
        output,
        *(option for text in options for option in ("--set", text)),
    ]
