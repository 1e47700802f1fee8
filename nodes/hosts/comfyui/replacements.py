"""Table of ComfyUI's nodes that ours can replace, for versions that offer to replace nodes."""

import json
from pathlib import Path

from comfy_api.latest import ComfyAPI, io

TABLE = Path(__file__).parents[3] / "web" / "replacements.json"  # the interface's menu reads it as well


async def register_replacements() -> None:
    """Registers the table; does nothing in versions without replacements, such as 0.3.64."""
    if not hasattr(io, "NodeReplace"):
        return
    for entry in json.loads(TABLE.read_text(encoding="utf-8")):
        await ComfyAPI().node_replacement.register(io.NodeReplace(**entry))
