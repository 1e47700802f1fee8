"""What Windows refuses, imitated: to move or remove a file that is open, to replace one for a moment, a backslash."""

import ast
import io
import os
import sys
from pathlib import Path

import pytest

from cascade_nodes.cascade_core import writing
from cascade_nodes.cascade_core.file_names import name_fault
from cascade_nodes.cascade_core.model_files import embedding_in
from cascade_nodes.headless import fetch as fetching
from cascade_nodes.headless.cli import main
from cascade_nodes.tests.headless.test_fetch import CONTENT, SHA256, fetch, hub, left, target

__all__ = ["hub", "target"]


@pytest.fixture
def refusing(monkeypatch):
    """Open files cannot be moved, replaced or removed, and there are no locks."""
    replace, unlink = os.replace, Path.unlink

    def check(*paths):
        opened = {os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}
        for path in paths:
            if os.path.realpath(path) in opened:
                raise PermissionError(13, "it is being used by another process", str(path))

    def checked_replace(source, destination):
        check(source, destination)
        replace(source, destination)

    def checked_unlink(path, missing_ok=False):
        check(path)
        unlink(path, missing_ok)

    monkeypatch.setattr(os, "replace", checked_replace)
    monkeypatch.setattr(Path, "unlink", checked_unlink)
    monkeypatch.setattr(fetching, "fcntl", None)


def test_a_file_is_fetched(refusing, hub, target):
    assert fetch(hub) == 0
    assert target.read_bytes() == CONTENT
    assert left(target) == ["stage_a.safetensors"]


def test_a_damaged_file_is_removed(refusing, hub, target, capsys):
    hub.storage[SHA256] = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    assert fetch(hub) == 1
    assert "arrived damaged" in capsys.readouterr().err
    assert left(target) == []


def test_what_nothing_has_come_of_is_removed(refusing, hub, target):
    hub.storage[SHA256] = b""
    assert fetch(hub) == 1
    assert left(target) == []


def test_a_file_that_is_open_for_a_moment_is_replaced(tmp_path, monkeypatch):
    replace, refusals = os.replace, [PermissionError(13, "it is being used by another process")] * 2

    def refused(source, destination):
        if refusals:
            raise refusals.pop()
        replace(source, destination)

    monkeypatch.setattr(os, "replace", refused)
    monkeypatch.setattr(writing, "PAUSE", 0)
    with pytest.raises(PermissionError):
        writing.write_file(tmp_path / "a", "elsewhere it is refused for good")
    monkeypatch.setattr(writing, "WINDOWS", True)
    writing.write_file(tmp_path / "a", "é")
    assert (tmp_path / "a").read_bytes() == "é".encode()
    refusals += [PermissionError(13, "it is being used by another process")] * 99
    with pytest.raises(PermissionError):
        writing.write_file(tmp_path / "a", "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_name_that_is_taken_meanwhile(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(1, "there are none")

    def taken(source, destination):
        raise FileExistsError(17, "there already", str(destination))

    monkeypatch.setattr(os, "link", no_links)
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda s, d: (taken if Path(d).name == "a" else rename)(s, d))
    with writing.temporary_file(tmp_path) as temporary:
        assert writing.move_to_free(temporary, [tmp_path / "a", tmp_path / "b"]).name == "b"


def test_an_embedding_in_a_folder(tmp_path):
    (tmp_path / "styles").mkdir()
    file = tmp_path / "styles" / "red.safetensors"
    file.write_bytes(b"")
    assert embedding_in([tmp_path], "styles\\red") == embedding_in([tmp_path], "styles/red") == file


@pytest.mark.parametrize("name", ["CONIN$", "com¹.png", "Lpt9", "nul .txt", "a.", "b "])
def test_names_that_no_file_has_there(name):
    assert name_fault(name)


@pytest.mark.parametrize("command", ["", "run", "train", "batch", "fetch", "merge", "convert-lora", "verify"])
def test_help_in_an_old_console(command, monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    assert end.value.code == 0
    console.flush()
    assert b"usage: cascade" in console.buffer.getvalue()  # type: ignore[attr-defined] (BytesIO's)


def test_text_files_state_their_encoding():
    """cp1252 reads and writes whatever else has none."""
    root, unstated = Path(__file__).parents[2], []
    for room in ("cascade_core", "nodes", "headless", "demo", "benchmarks"):
        for path in sorted((root / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and in_text(node) and "utf-8" not in ast.unparse(node):
                    unstated.append(f"{path.relative_to(root)}:{node.lineno}: {ast.unparse(node)[:60]}")
    assert unstated == []


def in_text(call: ast.Call) -> bool:
    """Whether a call reads or writes text, in an encoding that may be the system's."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    options = {option.arg: option.value for option in call.keywords}
    if "encoding" in options:
        return False
    if name in ("read_text", "write_text"):
        return isinstance(call.func, ast.Attribute)
    if name == "open" and isinstance(call.func, ast.Attribute):
        mode = call.args[0] if call.args else None
        return isinstance(mode, ast.Constant) and mode.value in ("r", "w", "a", "x")
    if name == "open":
        return "b" not in ast.unparse(call.args[1]) if len(call.args) > 1 else True
    return any(isinstance(options.get(key), ast.Constant) for key in ("text", "universal_newlines"))
