"""The package built from a clean clone holds the files that users need and no others, and works without the clone."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import cascade_nodes

ROOT = Path(__file__).parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
ROOMS = ("cascade_core", "demo", "headless", "nodes")
DATA = (  # what of the other files the package needs
    "cascade_core/engine/tuned.json",
    "cascade_core/text/data/",
    "demo/weights/",
    "example_workflows/",
    "locales/",
    "web/",
)
BUILD = "import sys, setuptools.build_meta as backend; print(getattr(backend, sys.argv[1])(sys.argv[2]))"


def output_of(command: list[str | Path], cwd: Path) -> str:
    """What a command prints, without this repository on Python's path. Fails with its error."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr + run.stdout
    return run.stdout.strip()


def build(kind: str, source: Path, folder: Path) -> Path:
    """Calls the hook of the build backend as pip and build do it; the file that it made."""
    folder.mkdir()
    return folder / output_of([sys.executable, "-c", BUILD, f"build_{kind}", folder], source).split("\n")[-1]


def tracked() -> list[str]:
    """The files of a clean clone."""
    listed = output_of(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT)
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def needed() -> set[str]:
    """The files that the package must hold: its modules, and the data."""
    names = {name for name in tracked() if name.startswith(DATA)}
    names |= {name for name in tracked() if name.endswith(".py") and name.split("/")[0] in ROOMS}
    return names | {"__init__.py", "py.typed", "cascade_core/py.typed"}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution, built from a clean clone."""
    folder = tmp_path_factory.mktemp("sdist")
    for name in tracked():
        (folder / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "clone" / name)
    return build("sdist", folder / "clone", folder / "dist")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel, built from the source distribution alone."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return build("wheel", folder / f"cascade_nodes-{VERSION}", folder / "dist")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A fresh environment with the wheel; the packages that it depends on are those of this one."""
    environment = tmp_path_factory.mktemp("environment")
    output_of([sys.executable, "-m", "venv", "--without-pip", environment], environment)
    python = environment / "bin" / "python"
    packages = output_of(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], environment
    )
    here = [path for path in sys.path if path.endswith("-packages")]
    (Path(packages) / "dependencies.pth").write_text("\n".join(here), encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", python]
    output_of([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], environment)
    return environment / "bin"


def test_the_source_distribution_holds_what_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if not name.endswith(".egg-info")}
    wanted = needed() | {"pyproject.toml", "setup.py", "README.md", "LICENSE"}
    assert wanted - names == set()
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "docs", ".git", ".ci"))]


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    own = {name.removeprefix("cascade_nodes/") for name in names if name.startswith("cascade_nodes/")}
    assert own == needed()
    metadata = f"cascade_nodes-{VERSION}.dist-info/"
    assert {name for name in names if not name.startswith("cascade_nodes/")} == {
        metadata + name
        for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt")
    }


def test_the_command_works_when_installed(installed, tmp_path):
    assert output_of([installed / "cascade", "--version"], tmp_path) == f"cascade-nodes {VERSION}"
    assert "CascadePriorSampler" in output_of([installed / "cascade", "nodes"], tmp_path)
    shutil.copy(ROOT / "example_workflows" / "api" / "text_to_image.json", tmp_path)
    output_of([installed / "cascade", "run", "text_to_image.json"], tmp_path)
    assert len(list((tmp_path / "output").glob("*.png"))) == 1


def test_the_package_works_when_installed(installed, tmp_path):
    code = """
import pathlib
import cascade_nodes
from cascade_nodes.cascade_core.pipeline import StableCascade
folder = pathlib.Path(cascade_nodes.__file__).parent
with StableCascade.load(folder / "demo" / "weights") as cascade:
    image = cascade("a red star", size=(64, 64), steps=1, seed=7)[0]
assert image.size == (64, 64)
print(cascade_nodes.__version__, folder)
"""
    version, folder = output_of([installed / "python", "-c", code], tmp_path).split()
    assert version == VERSION
    assert Path(folder).is_relative_to(installed.parent)


def test_the_version_is_said_once():
    assert cascade_nodes.__version__ == VERSION
