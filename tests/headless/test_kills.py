"""A process that is killed while it writes leaves whole files or none, and takes nothing from those beside it."""

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from cascade_nodes.cascade_core import writing
from cascade_nodes.cascade_core.checkpoints import write_safetensors
from cascade_nodes.headless.convert_lora import convert_lora
from cascade_nodes.headless.pictures import encode_png
from cascade_nodes.headless.saving import next_counter, numbered, save_new
from cascade_nodes.tests.core.lora_files import golden
from cascade_nodes.tests.obstacles import in_processes, no_links


def save_picture(folder: Path, shade: int) -> None:
    data = encode_png(torch.full((1, 64, 64, 3), shade / 255)[0], {})
    save_new(folder, lambda counter: numbered("out", counter), next_counter(folder, "out"), data)


def shades(folder: Path) -> list[int]:
    """Shades of all pictures, each of which must be whole."""
    found = []
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            (shade,) = set(np.asarray(picture).flat)
            found.append(int(shade))
    return sorted(found)


def killed(work: Callable[[], None], random: Random) -> None:
    """Runs a process that does its work over and over, and kills it at some moment after the first time."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os.write(writer, b"!")
            while True:
                work()
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as ready:
        assert ready.read(1) == b"!"
    time.sleep(random.random() * 0.1)
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("kills", [4, pytest.param(60, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_kill_while_pictures_are_saved(links, kills, tmp_path, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    random = Random(kills)

    def save_two(_: int) -> None:
        for _ in range(2):
            save_picture(tmp_path, 2)

    for kill in range(1, kills + 1):
        killed(partial(save_picture, tmp_path, 1), random)
        assert in_processes(2, save_two) == [0, 0]
        assert shades(tmp_path).count(2) == 4 * kill
    assert set(shades(tmp_path)) == {1, 2}
    check_left_over(tmp_path)


@pytest.mark.parametrize("kills", [4, pytest.param(60, marks=pytest.mark.nightly)])
def test_a_kill_while_a_lora_is_converted(kills, tmp_path):
    """It replaces a file that is there, which stays as it is or is replaced."""
    write_safetensors(tmp_path / "in.safetensors", golden("kohya"), {})
    expected = {}
    for dialect in ("peft", "omi"):
        convert_lora(tmp_path / "in.safetensors", tmp_path / f"{dialect}.safetensors", dialect)
        expected[dialect] = (tmp_path / f"{dialect}.safetensors").read_bytes()
    target = tmp_path / "made" / "out.safetensors"
    random = Random(kills)

    def convert() -> None:
        for dialect in expected:
            convert_lora(tmp_path / "in.safetensors", target, dialect, force=True)

    for _ in range(kills):
        killed(convert, random)
        assert target.read_bytes() in expected.values()
    check_left_over(target.parent)


def check_left_over(folder: Path) -> None:
    """Asserts that all that a kill leaves is hidden, and gone a day later."""
    for path in folder.glob(".*"):
        os.utime(path, (0, time.time() - 25 * 3600))
    writing.check_folder(folder)
    assert list(folder.glob(".*")) == []
