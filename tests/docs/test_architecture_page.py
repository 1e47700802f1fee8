"""docs/architecture.md is what the code is: its list of rooms, its layers, and its arrows."""

import re
import tomllib
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
    "contracts"
]
ROOMS = ("cascade_core", "demo", "headless", "nodes")


def layers(of: str) -> list[list[str]]:
    """Layers of a contract of import-linter, found by the beginning of its name."""
    contract = next(contract for contract in CONTRACTS if contract["name"].startswith(of))
    return [[room.strip() for room in layer.split("|")] for layer in contract["layers"]]


def rooms() -> dict[Path, str]:
    """The folders of the list, with what stands beside and below their names."""
    tree: list[tuple[int, Path]] = [(-1, ROOT)]
    texts: dict[Path, str] = {ROOT: ""}
    for line in BLOCKS[0].splitlines():
        indent = len(line) - len(line.lstrip())
        tree = [(depth, folder) for depth, folder in tree if depth < indent]
        if name := re.match(r" *([\w/]+)/  ", line):
            tree.append((indent, tree[-1][1] / name[1]))
        texts[tree[-1][1]] = texts.get(tree[-1][1], "") + line + "\n"
    return texts


def test_the_rooms_are_those_of_the_code():
    listed = rooms()
    assert [folder for folder in listed if not folder.is_dir()] == []
    folders = {path.parent for room in ROOMS for path in (ROOT / room).rglob("__init__.py")}
    assert {folder.relative_to(ROOT).as_posix() for folder in folders - listed.keys()} == set()


def test_the_files_of_a_room_are_there():
    missing = [
        f"{folder.relative_to(ROOT)}: {name}"
        for folder, text in rooms().items()
        for name in re.findall(r"[\w/]+\.py\b", text)
        if not any(path.match(name) for path in folder.rglob("*.py"))
    ]
    assert missing == []


def test_every_file_at_a_rooms_door_is_named():
    named = {name.split("/")[-1] for text in rooms().values() for name in re.findall(r"[\w/]+\.py\b", text)}
    files = {
        path.name for room in ("cascade_core", "headless", "nodes") for path in (ROOT / room).glob("[!_]*.py")
    }
    assert files - named == set()


def test_the_layers_are_those_that_the_linter_holds():
    core = next(block for block in BLOCKS if block.startswith("  pipeline\n"))
    assert [set(line.split()) for line in core.splitlines()] == [
        set(layer) for layer in layers("rooms of the core")
    ]


def test_the_chain_inside_training_is_the_linters():
    """Of the rooms that it names, the upper ones come first; `the other parts of a step` stand for the rest."""
    chain = re.search(r"^Inside training .*?```\n(.*?)\n```", PAGE, re.DOTALL | re.MULTILINE)
    assert chain is not None
    order = {name: depth for depth, layer in enumerate(layers("training:")) for name in layer}
    groups = [re.findall(r"[a-z_]+", group) for group in chain[1].splitlines()]
    depths = [[order[name] for name in group if name in order] for group in groups]
    assert all(max(upper) < min(lower) for upper, lower in pairwise(depths)), depths
    named = {name for group in groups for name in group}
    assert {"run", "loop", "tasks", "data", "settings", "typed_yaml"} <= named & order.keys()


def test_the_arrows_are_those_that_the_linter_holds():
    between_rooms, inside_nodes, into_comfyui = [block for block in BLOCKS if "──►" in block]
    chain = re.findall(r"\w+", between_rooms)
    assert chain == ["headless", "nodes", "cascade_core", "demo"]
    assert [[f"cascade_nodes.{room}"] for room in chain[:3]] == layers("headless -> nodes")
    assert "families ──► api, sockets ──► hosts ──► cascade_core" in inside_nodes
    families = layers("node families")
    assert families[-2:] == [["api", "sockets"], ["hosts"]]
    forbidden = next(contract for contract in CONTRACTS if contract["name"].startswith("the demo knows"))
    assert forbidden["forbidden_modules"] == ["cascade_nodes.headless", "cascade_nodes.nodes"]
    host, imported = into_comfyui.split("──►")
    contract = next(contract for contract in CONTRACTS if contract["name"].startswith("only nodes/hosts"))
    assert host.strip() in contract["name"]
    assert set(re.findall(r"\w+", imported)) <= set(contract["forbidden_modules"])
