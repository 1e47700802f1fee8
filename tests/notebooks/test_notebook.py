"""The notebook as it is committed, executed on the demo in a kernel of its own; the judge reads what its cells show."""

import base64
import io
import json
import os
import re
import subprocess
import sys
from math import hypot
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image
from torch import Tensor

from cascade_nodes.demo.high_resolution import squared
from cascade_nodes.demo.judge import read
from cascade_nodes.headless.catalogue import FILES
from cascade_nodes.headless.registry import describe
from cascade_nodes.nodes.extension import NODES

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "stable_cascade_colab.ipynb"
STAR_AND_RING = [("red", "star"), ("blue", "ring")]


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> dict[str, list[Tensor]]:
    """{cell: the pictures below it, each (3, H, W) in [0, 1]}"""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = tmp_path_factory.mktemp("notebook")
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    client.execute(env={**os.environ, "IPYTHONDIR": str(folder / "ipython")})
    return {cell["id"]: pictures_of(cell) for cell in notebook.cells if cell.cell_type == "code"}


def pictures_of(cell) -> list[Tensor]:
    encoded = [out.data["image/png"] for out in cell.outputs if "image/png" in out.get("data", {})]
    images = [Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB") for text in encoded]
    return [torch.from_numpy(np.asarray(image).copy()).movedim(-1, 0) / 255 for image in images]


def reading(picture: Tensor, taught: bool = False):
    return read(squared(picture[None]), taught=taught)[0]


def things(picture: Tensor, taught: bool = False) -> list[tuple[str | None, str | None]]:
    """(colour, shape) of each object, from left to right."""
    found = reading(picture, taught).objects
    return [(o.colour, o.shape) for o in sorted(found, key=lambda o: o.x)]


def moved(before: Tensor, after: Tensor) -> float:
    """How far the object that moved furthest is from where it was, in frames."""
    pairs = zip(reading(before).objects, reading(after).objects, strict=True)  # the largest first
    return max(hypot(a.x - b.x, a.y - b.y) for a, b in pairs)


def psnr(one: Tensor, other: Tensor) -> float:
    return -10 * (one - other).square().mean().log10().item()


def test_it_is_kept_without_what_it_shows():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count is None and not cell.outputs for cell in code)
    assert "REAL = False" in code[0].source


def test_the_switch_takes_the_published_files():
    """What the setup cell fetches is what the graphs then name."""
    setup, graph = (
        cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.id in ("setup", "graph")
    )
    fetched = [FILES[name] for line in re.findall(r"!cascade fetch (.*)", setup) for name in line.split()]
    code = f"REAL = True\n{graph}\nimport json\nprint(json.dumps([FILE, text_to_image('')]))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    named, nodes = json.loads(run.stdout)
    assert named.pop("lora") is None  # none was published
    assert sorted(named.values()) == sorted(file.saved_as for file in fetched)
    published = json.loads((ROOT / "example_workflows" / "api" / "text_to_image_published.json").read_text())
    for node in ("prior", "decoder"):
        (example,) = (n["inputs"] for n in published.values() if n["class_type"] == nodes[node]["class_type"])
        given = optional_values(nodes[node]["class_type"]) | nodes[node]["inputs"]
        assert {k: v for k, v in given.items() if not isinstance(v, list)} == {
            k: v for k, v in example.items() if not isinstance(v, list)
        }


def optional_values(class_type: str) -> dict[str, object]:
    """What a node takes for inputs that a graph leaves out."""
    (cls,) = (node for node in NODES if node.GET_SCHEMA().node_id == class_type)
    return {name: info.options["default"] for name, info in describe(cls).inputs.items() if not info.required}


def test_every_picture_has_its_size_and_shows_something(shown):
    sizes = {name: {tuple(picture.shape[1:]) for picture in pictures} for name, pictures in shown.items()}
    without = {"setup", "graph"}
    assert {name for name in sizes if not sizes[name]} == without
    assert all(sizes[name] == {(256, 256)} for name in sizes.keys() - without - {"landscape"})
    assert sizes["landscape"] == {(256, 384)}
    assert all(picture.std() > 0.02 for pictures in shown.values() for picture in pictures)


def test_the_prompt_is_followed(shown):
    (picture,) = shown["text_to_image"]
    assert things(picture) == STAR_AND_RING
    assert reading(picture).background == "sand"


def test_the_negative_prompt_is_avoided(shown):
    without, avoided = map(things, shown["negative_prompt"])
    assert [shape for _, shape in (*without, *avoided)] == ["star", "star"]
    assert without[0][0] in ("green", "black")
    assert avoided[0][0] not in ("green", "black", None)


def test_a_landscape_picture_follows_its_prompt(shown):
    (picture,) = shown["landscape"]
    assert things(picture) == [("green", "heart")]
    assert reading(picture).background == "grey"


def test_variations_show_the_same_things_and_differ(shown):
    first, second = shown["image_variation"]
    assert sorted(things(first)) == sorted(things(second)) == sorted(STAR_AND_RING)
    assert (first - second).abs().mean() > 0.005


def test_image_to_image_takes_the_new_background(shown):
    (source,) = shown["text_to_image"]
    near, far = shown["image_to_image"]
    assert things(near) == things(far) == STAR_AND_RING
    assert reading(far).background == "grass"
    assert max(moved(source, near), moved(source, far)) < 0.06


def test_the_edges_are_filled_anew(shown):
    (source,) = shown["text_to_image"]
    edges, picture = sorted(shown["controlnet"], key=lambda p: p.mean().item())
    assert 0.01 < edges.mean() < 0.2
    assert torch.equal(edges[0], edges[1])
    assert things(picture) == [("purple", "star"), ("orange", "ring")]
    assert reading(picture).background == "pink"
    assert moved(source, picture) < 0.06


def test_the_lora_teaches_its_word(shown):
    without, taught = shown["lora"]
    assert ("red", "house") not in things(without, taught=True)
    assert things(taught, taught=True) == [("red", "house")]


def test_the_reconstruction_is_the_picture(shown):
    (source,), (picture,) = shown["text_to_image"], shown["reconstruction"]
    assert psnr(source, picture) > 28
    assert things(picture) == STAR_AND_RING
