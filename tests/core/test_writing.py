"""Files are written whole or not at all, whatever other writers do and whenever the writer is killed."""

import argparse
import errno
import itertools
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cascade_nodes.cascade_core import writing
from cascade_nodes.tests.obstacles import files_limited_to, in_processes, no_links, permissions_respected

ROOMS = ("cascade_core", "nodes", "headless", "demo", "benchmarks")
NEW = b"new" * 1000


def save(folder: Path, data: bytes) -> Path:
    with writing.temporary_file(folder) as temporary:
        temporary.write_bytes(data)
        return writing.move_to_free(temporary, (folder / f"a_{i}" for i in itertools.count(1)))


def replace(folder: Path, data: bytes) -> None:
    writing.write_file(folder / "a_1", data)


@pytest.fixture(params=["links", "no links"])
def links(request, monkeypatch):
    if request.param == "no links":
        monkeypatch.setattr(os, "link", no_links)


@pytest.mark.parametrize("run", ["threads", "processes"])
def test_writers_in_one_folder_lose_nothing(links, run, tmp_path):
    def work(writer: int) -> None:
        for i in range(15):
            assert save(tmp_path, f"{writer} {i}".encode()).read_bytes() == f"{writer} {i}".encode()

    if run == "threads":
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
    else:
        assert in_processes(8, work) == [0] * 8
    contents = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert contents.keys() == {f"a_{i}" for i in range(1, 121)}
    assert sorted(contents.values()) == sorted(f"{writer} {i}" for writer in range(8) for i in range(15))


def test_writers_of_one_file_leave_one_of_theirs(tmp_path):
    def work(writer: int) -> None:
        for _ in range(15):
            replace(tmp_path, f"{writer}".encode() * 10_000)

    assert in_processes(4, work) == [0] * 4
    assert os.listdir(tmp_path) == ["a_1"]
    text = (tmp_path / "a_1").read_text()
    assert text == text[0] * 10_000


STAGES = [(save, name) for name in ("fsync", "link", "rename")] + [(replace, "fsync"), (replace, "replace")]


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(("write", "stage"), STAGES, ids=lambda value: getattr(value, "__name__", value))
def test_a_kill_leaves_a_whole_file_or_none(write, stage, moment, tmp_path):
    """What it leaves behind is hidden, and gone after a day."""
    (tmp_path / "a_1").write_bytes(b"old")
    original, pid = getattr(os, stage), os.getpid

    def killing(*arguments, **options):
        if moment == "after":
            original(*arguments, **options)
        os.kill(pid(), signal.SIGKILL)

    def work(_: int) -> None:
        if stage == "rename":
            os.link = no_links
        setattr(os, stage, killing)
        write(tmp_path, NEW)

    assert in_processes(1, work) == [-signal.SIGKILL]
    left = [path for path in tmp_path.iterdir() if path.name.endswith(".part")]
    contents = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path not in left}
    moved = moment == "after" and stage != "fsync"
    if write is save:
        assert contents == {"a_1": b"old"} | ({"a_2": NEW} if moved else {})
    else:
        assert contents == {"a_1": NEW if moved else b"old"}
    for path in left:
        os.utime(path, (0, time.time() - 25 * 3600))
    writing.check_folder(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(contents)


def test_what_is_swept(tmp_path):
    """Only our own names, not written to for a day, are swept; of a link, the link itself and not its target."""
    day = time.time() - 25 * 3600
    ours, theirs = [f".{'0123456789abcde' + end}.part" for end in "01"], tmp_path / "theirs"
    others = [".x.part", ".model.safetensors.0123456789abcdef.part", "0123456789abcdef.part", "a.png"]
    for name in (*ours, *others):
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (day, day))
    os.utime(tmp_path / ours[1])
    theirs.write_bytes(b"x")
    link = tmp_path / ".0123456789abcdef.part"
    link.symlink_to(theirs)
    os.utime(link, (day, day), follow_symlinks=False)
    writing.check_folder(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([ours[1], *others, "theirs"])


@pytest.mark.parametrize("write", [save, replace])
def test_what_fails_leaves_the_folder_as_it_was(write, tmp_path):
    (tmp_path / "a_1").write_bytes(b"old")
    with files_limited_to(100), pytest.raises(OSError, match="File too large"):
        write(tmp_path, NEW)
    tmp_path.chmod(0o555)
    with permissions_respected(), pytest.raises(PermissionError):
        write(tmp_path, NEW)
    tmp_path.chmod(0o755)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a_1": b"old"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_folder_as_it_was(error, tmp_path):
    def fail(temporary: Path) -> None:
        temporary.write_bytes(NEW)
        raise error

    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(error), writing.replacing(tmp_path / "a") as temporary:
        fail(temporary)
    with pytest.raises(error), writing.temporary_file(tmp_path) as temporary:
        fail(temporary)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old"}


def test_names_of_255_bytes(links, tmp_path):
    """Names may have characters of several bytes; the temporary name is short whatever the final one is."""
    names = ["x" * 255, "ü" * 127 + "x"]
    for name in names:
        writing.write_file(tmp_path / name, "text")
        with writing.temporary_file(tmp_path / "new") as temporary:
            writing.move_to_free(temporary, [tmp_path / "new" / name])
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "new"])
    assert sorted(os.listdir(tmp_path / "new")) == sorted(names)


def test_a_dangling_link_is_a_taken_name(links, tmp_path):
    (tmp_path / "a_1").symlink_to("elsewhere")
    assert save(tmp_path, NEW) == tmp_path / "a_2"
    assert sorted(os.listdir(tmp_path)) == ["a_1", "a_2"]


@pytest.mark.parametrize("linked", [False, True])
def test_what_is_not_a_file_is_not_replaced(linked, tmp_path):
    """Root may replace it, which would leave the machine without /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, reason in {"pipe": "a pipe or a device", "folder": "Is a directory"}.items():
        path = tmp_path / name
        if linked:
            (tmp_path / f"{name}_link").symlink_to(name)
            path = tmp_path / f"{name}_link"
        kind = path.lstat().st_mode
        for attempt in (writing.check_file, lambda path: writing.write_file(path, NEW)):
            with pytest.raises(OSError, match=reason):
                attempt(path)
        assert path.lstat().st_mode == kind
    assert not list(tmp_path.glob(".*"))


def test_a_network_drive_that_answers_twice(tmp_path, monkeypatch):
    """The first answer is lost, and the repeated request finds the name taken by the first one."""
    link = os.link

    def link_twice(*arguments):
        link(*arguments)
        link(*arguments)

    monkeypatch.setattr(os, "link", link_twice)
    assert save(tmp_path, NEW) == tmp_path / "a_1"
    assert os.listdir(tmp_path) == ["a_1"]


def test_no_free_name(links, tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with writing.temporary_file(tmp_path) as temporary, pytest.raises(FileExistsError):
        writing.move_to_free(temporary, [tmp_path / "a"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old"}


def test_what_cannot_be_written_is_found_before_the_work(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "locked").mkdir(mode=0o555)
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.rglob("*"))
    cases = {
        tmp_path: errno.EISDIR,
        Path(): errno.EISDIR,
        Path("/"): errno.EISDIR,
        tmp_path / "file" / "x": errno.ENOTDIR,
        tmp_path / "file" / "inner" / "x": errno.ENOTDIR,
        tmp_path / "locked" / "x": errno.EACCES,
        tmp_path / "locked" / "inner" / "x": errno.EACCES,
        tmp_path / "loop" / "x": errno.ELOOP,
        tmp_path / ("x" * 256): errno.ENAMETOOLONG,
        tmp_path / ("x" * 256) / "x": errno.ENAMETOOLONG,
        tmp_path / "new" / ("ü" * 128): errno.ENAMETOOLONG,
        tmp_path / "a\0b": errno.EINVAL,
        tmp_path / "new" / "a\ud800": errno.EINVAL,
    }
    for path, reason in cases.items():
        with permissions_respected(), pytest.raises(OSError, match=f"^.Errno {reason}. "):
            writing.check_file(path)
    for name in ("file", "new", "new/inner/x", "x" * 255):
        writing.check_file(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_command_asks_for_its_output_before_the_work(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=writing.output_file)
    assert parser.parse_args(["--json", f"{tmp_path}/new/x.json"]).json == tmp_path / "new" / "x.json"
    with pytest.raises(SystemExit):
        parser.parse_args(["--json", str(tmp_path)])
    assert f"argument --json: '{tmp_path}' cannot be written (Is a directory)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


WRITES = re.compile(
    r"""os\.(replace|rename|link)\(|getpid|save_file\(|torch\.save\(|\.tofile\(|np\.save|mkstemp|NamedTemporary"""
    r"""|(?<!temporary)\.write_(text|bytes)\(|(?<!temporary\.)\bopen\((.*, *)?["'][wxa]"""
)
ALLOWED = {
    "cascade_core/writing.py": "the one place",
    "cascade_core/training/log.py": "appends; a line that a kill cut off is left out at the next reading",
    "headless/batch/journal.py": "appends; a line that a kill cut off is ended at the next opening",
    "headless/batch/work.py": "a worker's name, in no file's name",
    "headless/fetch.py": "its parts are kept and resumed, under names of their own and a lock",
    "headless/cli.py": "the null device",
    "nodes/hosts/comfyui/vision.py": "into a temporary folder of its own",
    "demo/everything.py": "appends what its processes say to their logs",
    "demo/figures.py": "what its processes say, in their logs",
    "benchmarks/served_programs.py": "a server and its log, in a temporary folder of its own",
    "benchmarks/random_files.py": "into a temporary folder of its own",
    "benchmarks/rehearsed.py": "what its cells print, to its error stream",
    "benchmarks/batch.py": "into a temporary folder of its own",
    "benchmarks/ranks.py": "logs of its processes, into a temporary folder of its own",
    "benchmarks/load.py": "into a temporary folder of its own",
}


def test_nothing_is_written_past_this_module():
    root = Path(__file__).parents[2]
    sources = [path for room in ROOMS for path in (root / room).rglob("*.py")]
    assert len(sources) > 150
    writing_themselves = {
        path.relative_to(root).as_posix()
        for path in sources
        if any(WRITES.search(line) for line in path.read_text(encoding="utf-8").splitlines())
    }
    assert writing_themselves == ALLOWED.keys()
