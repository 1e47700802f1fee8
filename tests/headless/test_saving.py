"""Files appear whole or not at all, and never over another."""

import errno
import os
from pathlib import Path

import pytest

from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.headless.saving import check_folder, next_counter, resolve_prefix, save_new
from cascade_nodes.tests.obstacles import files_limited_to, permissions_respected


def test_prefix_variables():
    folder, start = resolve_prefix("%year%/a_%width%_%nothing%", Path("out"), 8, 9)
    assert start == "a_8_%nothing%"
    assert folder.parent == Path("out")
    assert 2024 <= int(folder.name) < 2200


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    (tmp_path / "a_1").write_bytes(b"mine")
    with files_limited_to(10), pytest.raises(CascadeError) as caught:
        save_new(tmp_path, lambda counter: f"a_{counter}", 2, bytes(100))
    reason = os.strerror(errno.EFBIG)
    expected = f"Cannot save {tmp_path}/a_2: {reason}; free some space or save elsewhere (--output)."
    assert str(caught.value) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["a_1"]


def test_a_name_taken_in_the_meantime_is_left_alone(tmp_path):
    (tmp_path / "a_1").write_bytes(b"theirs")
    path = save_new(tmp_path, lambda counter: f"a_{counter}", 1, b"ours")
    assert path == tmp_path / "a_2"
    assert ((tmp_path / "a_1").read_bytes(), path.read_bytes()) == (b"theirs", b"ours")
    assert next_counter(tmp_path, "a") == 1, "only names with a dot after the number count"


def test_a_folder_is_tried_before_the_work_and_left_as_it_was(tmp_path):
    check_folder(tmp_path / "new" / "inner")
    check_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_bytes(b"")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    for folder, reason in ((tmp_path / "file", errno.ENOTDIR), (locked / "new", errno.EACCES)):
        with permissions_respected(), pytest.raises(CascadeError) as caught:
            check_folder(folder)
        advice = "choose a folder that can be written to (--output)"
        assert str(caught.value) == f"Cannot save {folder}: {os.strerror(reason)}; {advice}."


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(CascadeError, match=r"File name too long; choose a shorter filename_prefix\.$"):
        save_new(tmp_path, lambda counter: "x" * 300, 1, b"")
    assert list(tmp_path.iterdir()) == []
