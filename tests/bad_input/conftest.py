import json
from pathlib import Path

import pytest
from PIL import Image

from cascade_nodes.headless.cli import main
from cascade_nodes.tests.bad_input.graphs import GRAPH, command, graphs
from cascade_nodes.tests.nodes.tiny import write_cascade


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder laid out as ComfyUI's `models`, with a tiny cascade."""
    folder = tmp_path_factory.mktemp("models")
    write_cascade(folder)
    return folder


@pytest.fixture
def working_folder(tmp_path, models, monkeypatch):
    """The current folder, with the graphs and a picture for them; the tiny networks are found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CASCADE_MODELS", str(models))
    for name, graph in graphs().items():
        (tmp_path / name).write_text(json.dumps(graph))
    Image.new("RGB", (64, 64), (200, 30, 30)).save("in.png")
    return tmp_path


@pytest.fixture
def refused(working_folder, capsys):
    """Runs a graph that must fail; gives the one sentence that was said."""

    def run(
        *assignments: str, graph: Path | str = GRAPH, output: str = "output", begun: bool | None = None
    ) -> str:
        before = sorted(working_folder.rglob("*"))
        assert main(command(graph, *assignments, output=output)) == 1
        out, err = capsys.readouterr()
        progress = [line for line in err.splitlines() if line.startswith("[")]
        (error_line,) = (line for line in err.splitlines() if line not in progress)
        assert out == ""
        assert sorted(working_folder.rglob("*")) == before, "nothing was left behind"
        assert begun is None or begun == bool(progress)
        assert error_line.startswith("error: ")
        assert error_line.endswith(".")
        return error_line.removeprefix("error: ")

    return run
