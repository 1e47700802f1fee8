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
from typing import NamedTuple

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image
from torch import Tensor

from cascade_nodes.cascade_core.checkpoints.layouts import SIGNATURES
from cascade_nodes.cascade_core.model_files import PARTS
from cascade_nodes.demo.high_resolution import squared
from cascade_nodes.demo.judge import read
from cascade_nodes.headless.catalogue import FILES
from cascade_nodes.tests.headless.published import write_sparse

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "stable_cascade_colab.ipynb"
STAR_AND_RING = [("red", "star"), ("blue", "ring")]


# Run before and after the notebook's own cells: which files are loaded, each as often as it is.
COUNTING = """
from pathlib import Path
from cascade_nodes.cascade_core import loaded as networks

loaded = []

def counted(load):
    def counting(*arguments):
        loaded.append(next(argument.name for argument in arguments if isinstance(argument, Path)))
        return load(*arguments)
    return counting

for name in [name for name in vars(networks) if name.startswith("load_")]:
    setattr(networks, name, counted(getattr(networks, name)))
"""
COUNTED = "import json; print(json.dumps(loaded))"


class Shown(NamedTuple):
    """pictures: {cell: those below it, each (3, H, W) in [0, 1]}; loaded: names of files in the order of loading"""

    pictures: dict[str, list[Tensor]]
    loaded: list[str]


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> Shown:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = list(notebook.cells)
    counting, counted = (nbformat.v4.new_code_cell(code) for code in (COUNTING, COUNTED))
    notebook.cells = [counting, *cells, counted]
    folder = tmp_path_factory.mktemp("notebook")
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where `cascade` is
    client.execute(env={**os.environ, "IPYTHONDIR": str(folder / "ipython"), "PATH": path})
    pictures = {cell["id"]: pictures_of(cell) for cell in cells if cell.cell_type == "code"}
    return Shown(pictures, json.loads(counted.outputs[0].text))


@pytest.fixture(scope="module")
def shown(executed) -> dict[str, list[Tensor]]:
    return executed.pictures


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


def test_each_network_is_loaded_once(executed):
    networks = ("stage_c", "stage_b", "stage_a", "image_encoder", "compressor", "controlnet_canny")
    files = ["demo_text_encoder", *(f"demo_{name}.safetensors" for name in networks)]
    assert sorted(executed.loaded) == sorted(files)


def test_the_switch_takes_the_published_files(tmp_path):
    """What the setup cell fetches is what the cascade then finds, sampled as the published graph samples."""
    setup, load = (
        cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.id in ("setup", "load")
    )
    lines = re.findall(r"!cascade fetch --to models (.*)", setup)
    fetched = {file.role: file for line in lines for file in map(FILES.__getitem__, line.split())}
    for role, file in fetched.items():
        signature = SIGNATURES[PARTS.get(role, role)]
        write_sparse(tmp_path / "models" / file.folder / file.saved_as, {signature: (1, 1)}, "BF16")
    code = f"""REAL = True
{load}
import json
from dataclasses import asdict
files = {{role: cascade.files.find(role).name for role in {sorted(fetched.keys() - {"controlnet"})!r}}}
print(json.dumps([files, CANNY, LORA, asdict(cascade.prior_settings), asdict(cascade.decoder_settings), cascade.size]))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    files, canny, lora, prior, decoder, size = json.loads(run.stdout.splitlines()[-1])
    assert {**files, "controlnet": canny} == {role: file.saved_as for role, file in fetched.items()}
    assert lora is None  # none was published
    published = json.loads((ROOT / "example_workflows" / "api" / "text_to_image_published.json").read_text())
    inputs = {node["class_type"]: node["inputs"] for node in published.values()}
    for settings, node in ((prior, "CascadePriorSampler"), (decoder, "CascadeDecoderSampler")):
        assert settings == {name: inputs[node][name] for name in settings}
    assert size == [inputs["CascadeEmptyLatent"][side] for side in ("width", "height")]


def test_no_owner_is_made_up():
    """The repository's address is left for the reader to set."""
    assert 'REPOSITORY = ""' in NOTEBOOK.read_text(encoding="utf-8").replace('\\"', '"')


def test_every_picture_has_its_size_and_shows_something(shown):
    sizes = {name: {tuple(picture.shape[1:]) for picture in pictures} for name, pictures in shown.items()}
    without = {"setup", "load"}
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


def test_the_command_makes_a_picture_too(shown):
    (picture,) = shown["command"]
    assert things(picture) == STAR_AND_RING


def test_the_reconstruction_is_the_picture(shown):
    (source,), (picture,) = shown["text_to_image"], shown["reconstruction"]
    assert psnr(source, picture) > 28
    assert things(picture) == STAR_AND_RING
