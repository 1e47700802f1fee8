"""The example graphs: each task's name, as of its prompt for the command line, and its title on the canvas.

ComfyUI's template browser shows a pack's graphs under their files' names, which therefore are titles: none of another
pack's or of ComfyUI's own, and numbered, because it sorts by nothing but these.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "example_workflows"
TITLES = {
    "text_to_image": "Cascade 01 Text to image, demo without download",
    "text_to_image_checkpoints": "Cascade 02 Text to image, published weights",
    "image_variation": "Cascade 03 Image variation, a picture as prompt",
    "image_to_image": "Cascade 04 Image to image",
    "inpaint": "Cascade 05 Inpainting",
    "controlnet_inpainting": "Cascade 06 Inpainting with ControlNet",
    "outpaint": "Cascade 07 Outpainting",
    "controlnet_canny": "Cascade 08 ControlNet canny, along edges",
    "super_resolution": "Cascade 09 ControlNet super resolution",
    "lora": "Cascade 10 LoRA and learned token",
    "few_steps": "Cascade 11 Few steps, LCM LoRA",
    "high_resolution": "Cascade 12 High resolution in two passes",
    "reconstruction": "Cascade 13 Reconstruction by the compressor",
}
# Of separate files, as `cascade fetch` gets them: a browser saves the text encoder under another name.
FOR_THE_COMMAND_LINE = "text_to_image_published"


def canvas_file(name: str) -> Path:
    """The graph that the interface opens."""
    return EXAMPLES / f"{TITLES[name]}.json"


def api_file(name: str) -> Path:
    """The prompt that the server and `cascade run` take."""
    return EXAMPLES / "api" / f"{name}.json"


def read(path: Path) -> dict[str, Any]:
    """A graph or prompt."""
    return json.loads(path.read_text(encoding="utf-8"))
