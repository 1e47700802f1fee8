"""What Windows does not have: links, fcntl, resource, signals and /proc, each hidden from a process of its own."""

import subprocess
import sys

HIDDEN = """
import os, pathlib, signal, sys
sys.modules["fcntl"] = sys.modules["resource"] = None
for name in ("link", "fork", "sysconf", "sched_getaffinity"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGHUP", "SIGKILL"):
    delattr(signal, name)
read = pathlib.Path.read_text
def read_text(self, *arguments, **options):
    if str(self).startswith("/proc"):
        raise FileNotFoundError(str(self))
    return read(self, *arguments, **options)
pathlib.Path.read_text = read_text
"""
WORK = """
import torch
from cascade_nodes.cascade_core.checkpoints import load, pages
from cascade_nodes.cascade_core.placement.pinned import available_bytes, pinned_pages
from cascade_nodes.cascade_core.run import process_peak
from cascade_nodes.cascade_core.writing import move_to_free, temporary_file
from cascade_nodes.headless import cli, fetch, signals
from cascade_nodes.headless.verify import machine
folder = pathlib.Path(sys.argv[1])
for expected in ("a", "b"):
    with temporary_file(folder) as temporary:
        temporary.write_text(expected, encoding="utf-8")
        assert move_to_free(temporary, [folder / "a", folder / "b"]).name == expected
assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]
assert pages.mapped_files() == [] and available_bytes() is None and process_peak() == 0
pages.forget_pages([torch.zeros(8)], [])
assert pinned_pages(4096, lambda address, size: False, lambda address: None) is not None
assert load._memory() == 0  # it does not say: weights are read when they are used
"""


def test_nothing_needs_them(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", HIDDEN + WORK, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
