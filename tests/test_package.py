"""The folder as a package: one identity, no heavy import at the door, arrows that only point one way."""

import ast
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from xml.etree import ElementTree

from cascade_nodes.tests.registry import (
    LARGEST_ARCHIVE,
    OWNER,
    archive_names,
    publishing_steps,
    run_step,
    tracked_names,
)

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
CORE = ROOT / "cascade_core"

IMPORT_EVERYTHING = """
import asyncio, collections, importlib.util, pathlib, pkgutil, sys
import cascade_nodes

rooms = ("cascade_core", "demo", "headless", "nodes")
foreign = [".hosts.comfyui", "__main__"]
if importlib.util.find_spec("triton") is None:  # it comes for Linux alone
    foreign += [".engine.cuda", ".engine.kernels."]
for room in rooms:
    package = importlib.import_module(f"cascade_nodes.{room}")
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not any(part in module.name for part in foreign):
            importlib.import_module(module.name)
extension = asyncio.run(cascade_nodes.comfy_entrypoint())
ids = [node.GET_SCHEMA().node_id for node in asyncio.run(extension.get_node_list())]
assert len(ids) == len(set(ids)) > 0, ids

files = collections.defaultdict(list)
for name, module in list(sys.modules.items()):
    if name != "__main__" and getattr(module, "__file__", None):
        files[module.__file__].append(name)
root = pathlib.Path(cascade_nodes.__path__[0])
ours = {str(file) for room in rooms for file in (root / room).rglob("*.py")} | {str(root / "__init__.py")}
assert len(ours & files.keys()) > 20, "the files of the imported modules are not those of this folder"
print(*(names for file, names in files.items() if len(names) > 1 and file in ours))
"""


def python(code: str, *arguments: str, cwd: Path | None = None) -> str:
    """What a fresh interpreter prints. Fails with its error where it exits non-zero."""
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_the_root_is_the_package(tmp_path):
    code = """
import sys
import cascade_nodes
print(cascade_nodes.__file__, *sorted({"torch", "numpy"} & sys.modules.keys()))
"""
    assert python(code, cwd=tmp_path) == str(ROOT / "__init__.py")


def test_core_imports_alone(tmp_path):
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import cascade_core
print(cascade_core.__file__, *sorted({"cascade_nodes", "nodes", "headless", "demo"} & sys.modules.keys()))
"""
    assert python(code, str(ROOT), cwd=tmp_path) == str(ROOT / "cascade_core" / "__init__.py")


def test_no_module_exists_twice(tmp_path):
    assert python(IMPORT_EVERYTHING, cwd=tmp_path) == ""


def test_help_imports_no_torch(tmp_path):
    code = """
import sys
from cascade_nodes.headless.cli import main
sys.argv = ["cascade", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code
print("heavy:", *sorted({"torch", "transformers", "numpy", "PIL"} & sys.modules.keys()))
"""
    assert python(code, cwd=tmp_path).splitlines()[-1] == "heavy:"


def test_console_script_is_installed(tmp_path):
    run = subprocess.run(
        [BIN / "cascade", "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "run" in run.stdout
    assert "nodes" in run.stdout


def test_arrows_point_one_way():
    run = subprocess.run(
        [BIN / "lint-imports", "--no-logo"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout


def imports_of(path: Path) -> Iterator[tuple[str, ...]]:
    """The core's modules that one of its files imports, as paths; nested imports and those for types included."""
    package = path.relative_to(CORE).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = package[: len(package) - node.level + 1]
            module = (*start, *(node.module.split(".") if node.module else ()))
            yield from ((*module, alias.name) for alias in node.names)


def file_of(name: tuple[str, ...]) -> Path | None:
    """The file of a module, or of the one that holds the name."""
    for parts in (name, name[:-1]):
        for path in (CORE.joinpath(*parts).with_suffix(".py"), CORE.joinpath(*parts, "__init__.py")):
            if path.is_file() and path != CORE / "__init__.py":
                return path
    return None


def test_no_import_of_the_core_leads_back():
    """No cycles between files, nor between folders; imports within functions count."""
    files: dict[Path, set[Path]] = {}
    rooms: dict[str, set[str]] = {}
    for path in CORE.rglob("*.py"):
        targets = {target for name in imports_of(path) if (target := file_of(name)) is not None} - {path}
        files[path] = targets
        if path.parent == CORE and path.name == "__init__.py":
            continue
        room = path.relative_to(CORE).parts[0].removesuffix(".py")
        reached = {target.relative_to(CORE).parts[0].removesuffix(".py") for target in targets}
        rooms.setdefault(room, set()).update(reached - {room})
    assert sum(map(len, files.values())) > 100
    for graph in (files, rooms):
        TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_registry_gets_what_users_need():
    """Every file that works or is read there, and nothing that only the project's own development needs."""
    names = archive_names()
    rooms = (
        "cascade_core/",
        "demo/",
        "example_workflows/",
        "headless/",
        "locales/",
        "nodes/",
        "subgraphs/",
        "web/",
    )
    assert {name for name in tracked_names() if name.startswith(rooms)} <= names
    assert {"__init__.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "SECURITY.md"} <= names
    assert {name for name in tracked_names() if name.startswith("docs/") and name.endswith(".md")} <= names
    not_for_users = ("tests/", "benchmarks/", "typings/", ".github/", ".ci/", "docs/images/", "Makefile")
    assert not [name for name in names if name.startswith(not_for_users)]
    # Weights do not compress: of the files' own sizes nearly all is in the archive.
    assert sum((ROOT / name).stat().st_size for name in names) <= LARGEST_ARCHIVE
    ignored = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    assert all((ROOT / entry).exists() for entry in ignored if entry and not entry.startswith("#"))
    comfy = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["comfy"]
    assert comfy["requires-comfyui"] == ">=0.3.64"
    assert "web" not in comfy  # beside WEB_DIRECTORY it would serve every script twice
    assert not (
        ROOT / "requirements.txt"
    ).exists()  # ComfyUI has what the nodes need: nothing is installed over it


def test_publishing_names_publisher_repository_and_icon(tmp_path):
    """The release workflow publishes so, wherever the repository lives; nothing else changes."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    naming = run_step(next(iter(publishing_steps().values())), tmp_path)
    assert naming.returncode == 0, naming.stderr
    before, after = (
        tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8")) for folder in (ROOT, tmp_path)
    )
    assert after["project"].pop("urls") == {"Repository": f"https://github.com/{OWNER}/cascade-nodes"}
    icon = after["tool"]["comfy"].pop("Icon")
    assert icon == f"https://raw.githubusercontent.com/{OWNER}/cascade-nodes/main/icon.svg"
    assert after["tool"]["comfy"].pop("PublisherId") == OWNER
    before["tool"]["comfy"].pop("PublisherId")
    assert after == before


def test_publishing_without_a_key_says_which_secret_is_missing(tmp_path):
    published = run_step(publishing_steps()["Publish"], tmp_path, REGISTRY_ACCESS_TOKEN="")
    assert published.returncode != 0
    assert "REGISTRY_ACCESS_TOKEN: is missing: make a key" in published.stderr


def test_the_icon_is_square_and_small():
    root = ElementTree.parse(ROOT / "icon.svg").getroot()
    assert root.attrib["width"] == root.attrib["height"]
    assert int(root.attrib["width"]) <= 400
