"""Writes the pictures of the example graphs: docs/images/graph_*.png, and a thumbnail beside each graph.

    python -m cascade_nodes.tests.comfyui.browser.screenshots

The newest checkout draws them. A graph whose models are there is run first, so that its picture is seen in it, and
that picture becomes its thumbnail; the others' is the graph.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from cascade_nodes.tests.comfyui.browser import browser
from cascade_nodes.tests.comfyui.checkout import CHECKOUTS, PACK, Server

SHOOTER = Path(__file__).parent / "screenshot.mjs"
EXAMPLES = PACK / "example_workflows"
IMAGES = PACK / "docs" / "images"
SAVE_NODE = 10
THUMBNAIL = (512, 512)


def main() -> None:
    """Draws them all."""
    lacking = browser.missing() or (None if CHECKOUTS else "there is no ComfyUI to draw with")
    if lacking:
        sys.exit(lacking)
    with tempfile.TemporaryDirectory() as base, Server(CHECKOUTS[-1], Path(base)) as server:
        for path in sorted(EXAMPLES.glob("*.json")):
            graph = json.loads(path.read_text(encoding="utf-8"))
            runs = not any(node["properties"].get("models") for node in graph["nodes"])
            picture = IMAGES / f"graph_{path.stem}.png"
            shoot(server.url, graph, picture, SAVE_NODE if runs else None)
            made = sorted((server.base / "output").glob("*.png"))
            thumbnail = Image.open(made[-1] if runs else picture).convert("RGB")
            thumbnail.thumbnail(THUMBNAIL)
            thumbnail.save(path.with_suffix(".jpg"), quality=90)


def shoot(url: str, graph: dict, picture: Path, run: int | None) -> None:
    """One picture; `run` is the node whose picture is waited for, None where the graph is not run."""
    settings = {"url": url, "nodes2": False, "chromium": browser.find_chromium()}
    settings |= {"graph": graph, "picture": str(picture), "run": run}
    subprocess.run(
        ["node", SHOOTER], input=json.dumps(settings), env=browser.environment(), text=True, check=True
    )


if __name__ == "__main__":
    main()
