"""Writes the pictures of the example graphs: docs/images/graph_*.png, and a thumbnail beside each graph.

    python -m cascade_nodes.tests.comfyui.browser.screenshots [EXAMPLE …]

The newest checkout draws them. A graph whose models are there is run first, so that its pictures are seen in it; they
become its thumbnail, beside the picture that it starts from. The others' is the graph.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from math import ceil, sqrt
from pathlib import Path
from typing import Any

from PIL import Image

from cascade_nodes.tests.comfyui.browser import browser
from cascade_nodes.tests.comfyui.checkout import CHECKOUTS, PACK, Server
from cascade_nodes.tests.web.examples import EXAMPLES, TITLES, canvas_file, read

SHOOTER = Path(__file__).parent / "screenshot.mjs"
INPUT = EXAMPLES / "input"
IMAGES = PACK / "docs" / "images"
SIDE, GAP = 256, 8  # pixels of a picture in a thumbnail, and between two
BEHIND = (60, 60, 60)  # what is seen through a mask


def main(names: Sequence[str]) -> None:
    """Draws the graphs of these names, or all."""
    lacking = browser.missing() or (None if CHECKOUTS else "there is no ComfyUI to draw with")
    if lacking:
        sys.exit(lacking)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        shutil.copytree(INPUT, base / "input")
        with Server(CHECKOUTS[-1], base) as server:
            for name in names or TITLES:
                draw(server, name)


def draw(server: Server, name: str) -> None:
    """The picture of one graph, and its thumbnail."""
    path = canvas_file(name)
    graph = read(path)
    runs = not any(node["properties"].get("models") for node in graph["nodes"])
    picture = IMAGES / f"graph_{name}.png"
    before = set((server.base / "output").glob("*.png"))
    (save,) = of_type(graph, "SaveImage")
    shoot(server.url, graph, picture, save["id"] if runs else None)
    if runs:
        pictures = sorted(set((server.base / "output").glob("*.png")) - before)
        sources = [INPUT / node["widgets_values"][0] for node in of_type(graph, "LoadImage")]
        small = thumbnail([Image.open(file) for file in sources], [Image.open(file) for file in pictures])
    else:
        small = Image.open(picture).convert("RGB")
        small.thumbnail((2 * SIDE, 2 * SIDE))
    small.save(path.with_suffix(".jpg"), quality=90)


def of_type(graph: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The nodes of a type in a graph."""
    return [node for node in graph["nodes"] if node["type"] == kind]


def shoot(url: str, graph: dict[str, Any], picture: Path, run: int | None) -> None:
    """One picture; `run` is the node whose picture is waited for, None where the graph is not run."""
    settings = {"url": url, "nodes2": False, "chromium": browser.find_chromium()}
    settings |= {"graph": graph, "picture": str(picture), "run": run}
    subprocess.run(
        ["node", SHOOTER], input=json.dumps(settings), env=browser.environment(), text=True, check=True
    )


def thumbnail(sources: Sequence[Image.Image], results: Sequence[Image.Image]) -> Image.Image:
    """A graph's input picture and, to its right, its results; several results are small pictures in a square."""
    columns = ceil(sqrt(len(results)))
    rows = [results[start : start + columns] for start in range(0, len(results), columns)]
    result = joined([joined([opaque(one) for one in row], across=True) for row in rows], across=False)
    parts = [*map(opaque, sources), result]
    if len(parts) == 1:
        result.thumbnail((2 * SIDE, 2 * SIDE))
        return result
    return joined([to_height(part) for part in parts], across=True)


def opaque(picture: Image.Image) -> Image.Image:
    """A picture without transparency."""
    below = Image.new("RGB", picture.size, BEHIND)
    below.paste(picture, mask=picture if "A" in picture.getbands() else None)
    return below


def to_height(picture: Image.Image) -> Image.Image:
    """A picture resized to SIDE pixels high; a small one shows its pixels."""
    size = (round(picture.width * SIDE / picture.height), SIDE)
    return picture.resize(
        size, Image.Resampling.NEAREST if picture.height < SIDE else Image.Resampling.LANCZOS
    )


def joined(pictures: Sequence[Image.Image], *, across: bool) -> Image.Image:
    """Pictures of one height side by side, or of one width one above the other."""
    along = [picture.width if across else picture.height for picture in pictures]
    total = sum(along) + GAP * (len(pictures) - 1)
    first = pictures[0]
    sheet = Image.new("RGB", (total, first.height) if across else (first.width, total), "white")
    for index, picture in enumerate(pictures):
        start = sum(along[:index]) + GAP * index
        sheet.paste(picture, (start, 0) if across else (0, start))
    return sheet


if __name__ == "__main__":
    main(sys.argv[1:])
