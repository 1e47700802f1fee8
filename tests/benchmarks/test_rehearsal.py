"""benchmarks/rehearsal.py: its measurements of known allocations, what it stops, and the files that it writes."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from cascade_nodes.cascade_core.checkpoints.files import read_header
from cascade_nodes.headless.catalogue import FILES
from cascade_nodes.tests.benchmarks.conftest import BENCHMARKS

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "stable_cascade_colab.ipynb"
MB = 1_000_000

CELLS = {
    "nothing": "import mmap, time",
    "anonymous": "block = b'x' * 300_000_000; time.sleep(0.3)",
    "shared": """del block
pages = mmap.mmap(-1, 200_000_000)
pages.write(b'x' * 200_000_000); time.sleep(0.3)""",
    "files": """pages.close()
from pathlib import Path
Path('file').write_bytes(b'x' * 250_000_000)
with open('file', 'rb') as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
sum(mapped[i] for i in range(0, 250_000_000, 4096)); time.sleep(0.3)""",
    "command": "!cascade --help",
    "unlimited": "hoard = [b'x' * 50_000_000 for _ in range(200) if not time.sleep(0.02)]",
    "never": "raise AssertionError('after the end')",
}


def write_notebook(path: Path, cells: dict[str, str]) -> Path:
    code = [
        {"cell_type": "code", "id": name, "metadata": {}, "outputs": [], "source": source.splitlines(True)}
        for name, source in cells.items()
    ]
    titles: list[dict[str, Any]] = [
        {"cell_type": "markdown", "id": f"about_{name}", "metadata": {}, "source": [f"## {name} · 名前\n"]}
        for name in cells
    ]
    pairs = [cell for pair in zip(titles, code, strict=True) for cell in pair]
    path.write_text(json.dumps({"cells": pairs, "metadata": {}, "nbformat": 4}), encoding="utf-8")
    return path


def notebook_cells() -> dict[str, str]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return {cell["id"]: "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> dict[str, Any]:
    """The notebook's first cells with the switch, known allocations, and one that never ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        rehearsal: Any = importlib.import_module("rehearsal")
    folder = tmp_path_factory.mktemp("rehearsal")
    (folder / "models").mkdir()
    real = notebook_cells()
    path = write_notebook(folder / "cells.ipynb", {"setup": real["setup"], "load": real["load"], **CELLS})
    settings = rehearsal.Settings(str(path), None, 0, 1500 * MB, published=True)
    return rehearsal.rehearse(settings, folder)


def test_the_cells_are_run_as_on_colab_with_the_switch(rehearsed):
    setup, load, *others = rehearsed["cells"]
    assert [cell["title"] for cell in others] == list(CELLS)[:5]
    assert [line.split()[0] for line in setup["skipped"]] == ["(test", "cascade", "cascade"]
    assert all(not cell["skipped"] for cell in (load, *others))


def test_peaks_are_those_of_known_allocations(rehearsed):
    cells = {cell["title"]: cell for cell in rehearsed["cells"]}
    before = cells["nothing"]
    more = {"anonymous": 300, "shared": 200, "files": 250}  # MB
    for kind, size in more.items():
        assert cells[kind][kind] - before[kind] == pytest.approx(size * MB, abs=40 * MB)
    assert cells["files"]["main"] < before["main"] + 400 * MB  # written from memory, and mapped pages apart
    assert cells["anonymous"]["main"] == pytest.approx(before["main"] + 300 * MB, abs=40 * MB)


def test_a_command_counts_with_the_notebook(rehearsed):
    cells = {cell["title"]: cell for cell in rehearsed["cells"]}
    assert cells["command"]["main"] > cells["nothing"]["main"] + 30 * MB


def test_a_cell_that_takes_too_much_is_stopped(rehearsed):
    sentence = rehearsed["failed"]
    assert sentence.startswith("“unlimited” took 1.")
    assert "GB of main memory, where there are 1.5 GB: the cells were stopped" in sentence
    assert rehearsed["cells"][-1]["title"] == "command"


def test_the_page_tells_the_table_again_and_again(rehearsed, module):
    page = module("rehearsal_page")
    result = {**rehearsed, "device": "a card", "torch": "2.11.0+cu", "date": "2026-11-30", "card": None}
    result["main"] = 1500 * MB
    told = page.fill("before\n<!-- rehearsal -->\n<!-- end -->\nafter", result)
    assert page.fill(told, result) == told
    assert told.startswith(
        "before\n<!-- rehearsal -->\n\nRehearsed on a card, torch 2.11.0, 30 November 2026"
    )
    assert told.count("\n| ") == 1 + len(rehearsed["cells"])
    assert "`cascade fetch --to models stage_c_bf16" in told
    assert f"**{rehearsed['failed']}**" in told


def test_files_are_as_large_as_the_published_ones(module):
    rehearsal = module("rehearsal")
    names = rehearsal.fetched(NOTEBOOK)
    assert {"stage_c_bf16", "stage_b_bf16", "stage_a", "text_encoder"} <= set(names)
    for name in names:
        tensors, _ = rehearsal.published_tensors(name)
        assert sum(tensor.nbytes for tensor in tensors.values()) == pytest.approx(FILES[name].size, rel=0.01)


def test_random_files_are_whole(module, tmp_path):
    rehearsal = module("rehearsal")
    tensors, dtype = rehearsal.published_tensors("effnet_encoder")
    rehearsal.write_random(tmp_path / "file.safetensors", tensors, dtype)
    weights = load_file(tmp_path / "file.safetensors")
    assert read_header(tmp_path / "file.safetensors").tensors.keys() == tensors.keys()
    assert all(value.isfinite().all() for value in weights.values())
    assert all((value > 0).all() for name, value in weights.items() if name.endswith("running_var"))
    assert len({value.double().sum().item() for name, value in weights.items() if value.ndim == 4}) > 50
