"""Files appear whole or not at all, and never over another."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.headless import run_graph
from cascade_nodes.headless.builtin import BUILTIN_NODES
from cascade_nodes.headless.registry import by_id
from cascade_nodes.headless.saving import check_folder, next_counter, resolve_prefix, save_new
from cascade_nodes.nodes.hosts import schema as io
from cascade_nodes.tests.headless.record_comfyui import node
from cascade_nodes.tests.obstacles import files_limited_to, in_processes, permissions_respected


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


class ToyShade(io.ComfyNode):
    """A picture of one shade of grey."""

    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="ToyShade", inputs=[io.Int.Input("shade")], outputs=[io.Image.Output()])

    @classmethod
    def execute(cls, shade):
        return io.NodeOutput(torch.full((1, 64, 64, 3), shade / 255))


def run_shade(folder: Path, shade: int) -> Path:
    nodes = by_id([ToyShade, *BUILTIN_NODES])
    graph = {
        "1": node("ToyShade", shade=shade),
        "2": node("SaveImage", images=["1", 0], filename_prefix="sub/out"),
    }
    (picture,) = run_graph(graph, output_folder=folder, nodes=nodes).pictures
    return picture.path


def shade_of(path: Path) -> int:
    with Image.open(path) as picture:
        (shade,) = set(np.asarray(picture).flat)
        return int(shade)


@pytest.mark.parametrize("threads", [True, False], ids=["threads", "processes"])
def test_graphs_that_run_side_by_side_save_their_own_pictures(threads, tmp_path):
    """48 pictures, each its run's own, from six threads or from processes that all are number 1, as in containers."""

    def work(first: int) -> None:
        for shade in range(first, 48, 6):
            assert shade_of(run_shade(tmp_path, shade)) == shade

    if threads:
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(work, range(6)))
    else:
        assert in_processes(6, work) == [0] * 6
    pictures = sorted((tmp_path / "sub").iterdir())
    assert [path.name for path in pictures] == [f"out_{i:05}_.png" for i in range(1, 49)]
    assert sorted(map(shade_of, pictures)) == list(range(48))


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(CascadeError, match=r"File name too long; choose a shorter filename_prefix\.$"):
        save_new(tmp_path, lambda counter: "x" * 300, 1, b"")
    assert list(tmp_path.iterdir()) == []
