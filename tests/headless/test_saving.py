"""Files appear whole or not at all, and never over another."""

import errno
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest

from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.headless.saving import next_counter, resolve_prefix, save_new


def test_prefix_variables():
    folder, start = resolve_prefix("%year%/a_%width%_%nothing%", Path("out"), 8, 9)
    assert start == "a_8_%nothing%"
    assert folder.parent == Path("out")
    assert 2024 <= int(folder.name) < 2200


@contextmanager
def files_limited_to(size: int):
    """The system refuses to let a file grow beyond `size` bytes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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
