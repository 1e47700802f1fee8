"""benchmarks/served.py: pictures of real servers with tiny networks on the processor, and what it derives of them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cascade_nodes.tests.benchmarks.conftest import BENCHMARKS
from cascade_nodes.tests.comfyui.checkout import CHECKOUTS

GIB = 1e9


def call(*arguments: str | Path, status: int = 0) -> str:
    command = [
        sys.executable,
        str(BENCHMARKS / "served.py"),
        "--toy",
        "--runs",
        "1",
        "--quick",
        *map(str, arguments),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == status, finished.stdout + finished.stderr
    return finished.stdout


def write_trace(path: Path, events: list[tuple[str, float, float, int]]) -> Path:
    """Trace as torch's profiler writes it: (name, start, end in seconds, bytes), the last copy at its end."""
    events = [*events, ("Memcpy HtoD (Pageable -> Device)", 9.0, 9.001, (1 << 20) + 13)]
    traced = [
        {
            "ph": "X",
            "cat": "gpu_memcpy" if name.startswith("Memcpy") else "kernel",
            "name": name,
            "ts": 1e6 * start,
            "dur": 1e6 * (end - start),
            "args": {"bytes": size},
        }
        for name, start, end, size in events
    ]
    path.write_text(
        json.dumps({"traceEvents": [{"ph": "M", "name": "process_name"}, *traced]}), encoding="utf-8"
    )
    return path


PINNED, PAGEABLE, BACK = (
    f"Memcpy {kind}" for kind in ("HtoD (Pinned -> Device)", "HtoD (Pageable -> Device)", "DtoH")
)


def test_bytes_to_the_card_are_counted_by_memory(module, tmp_path: Path):
    events = [
        (PINNED, 0, 0.1, 5 * 10**9),
        (PAGEABLE, 0.2, 0.3, 10**9),
        (BACK, 0.4, 0.5, 10**9),
        ("gemm", 0, 0.05, 0),
    ]
    summary = module("copies").Traced(write_trace(tmp_path / "trace", events)).summary()
    assert (summary["gb"], summary["pinned_gb"], summary["pageable_gb"], summary["count"]) == (6, 5, 1, 2)
    assert summary["seconds"] == pytest.approx(0.2)
    assert summary["alone_seconds"] == pytest.approx(0.15)


def test_a_trace_that_was_cut_off_is_not_counted(module, tmp_path: Path):
    path = tmp_path / "trace"
    path.write_text(json.dumps({"traceEvents": []}), encoding="utf-8")
    with pytest.raises(ValueError, match="cut off"):
        module("copies").Traced(path)


@pytest.mark.parametrize(
    ("events", "longer"),
    [
        ([(PINNED, 0, 0.05, 25 * 10**8)], 0.05),  # waited for: twice as long at half the 50 GB/s
        ([(PINNED, 0, 0.05, 25 * 10**8), ("gemm", 0, 0.1, 0)], 0.0),  # hidden, and still
        ([(PINNED, 0, 0.1, 5 * 10**9), ("gemm", 0, 0.1, 0)], 0.1),  # hidden, until the bus is the limit
        ([(PINNED, 0, 0.1, 5 * 10**9), ("gemm", 0, 0.06, 0)], 0.1),  # in part
        ([(PAGEABLE, 0, 1.0, 5 * 10**9)], 0.0),  # slower than the bus already
        ([("gemm", 0, 1.0, 0)], 0.0),
        # As many bytes and kernels, a second later: those do not hide these.
        ([(PINNED, 0, 0.05, 25 * 10**8), ("gemm", 1.0, 1.1, 0)], 0.05),
    ],
)
def test_slower_buses_are_predicted(module, tmp_path: Path, events: list[Any], longer: float):
    traced = module("copies").Traced(write_trace(tmp_path / "trace", events))
    assert traced.slower(25) == pytest.approx(longer, abs=1e-6)


def test_a_row_that_fails_leaves_the_others(tmp_path: Path):
    """Two checkouts, neither of which starts; then no time is left."""
    for version in ("1.0.0", "2.0.0"):
        folder = tmp_path / version
        folder.mkdir()
        (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
        (folder / "main.py").write_text("raise SystemExit('no card')\n")
    path, checkouts = tmp_path / "served.json", (tmp_path / "1.0.0", tmp_path / "2.0.0")
    base = ("--rows", "native", "--folder", tmp_path / "base", "--json", path)
    printed = call(*checkouts, *base, status=1)
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [row["comfyui"] for row in rows] == ["1.0.0", "2.0.0"]
    assert all("ComfyUI did not start (1)" in row["error"] and "no card" in row["error"] for row in rows)
    assert "no card" in printed
    printed = call(*checkouts, *base, "--budget", "1", status=1)
    assert "LEFT OUT, since 1 seconds were over: native 1.0.0 all; native 2.0.0 all" in printed
    assert json.loads(path.read_text(encoding="utf-8"))["rows"] == rows


def check(row: dict[str, Any]) -> None:
    assert "error" not in row
    assert {"seed", "prompt", "png", "first", "allocator", "torch", "date", "machine", "pack"} <= row.keys()
    assert {name: len(times) for name, times in row["times"].items()} == {"seed": 1, "prompt": 1, "png": 1}
    assert "sees no card" in row["copies_missing"]
    first, warm = (row[name]["nodes"] for name in ("first_profile", "warm_profile"))
    assert {"1 (StageCLoader)", "7 (CascadePriorSampler)", "picture (CascadeDecode)"} <= first.keys()
    assert "7 (CascadePriorSampler)" in warm
    assert "1 (StageCLoader)" not in warm
    assert sum(first.values()) == pytest.approx(row["first"], rel=0.5)


@pytest.mark.skipif(
    not CHECKOUTS, reason="no ComfyUI to test against: set COMFYUI_PATH, or see docs/testing.md"
)
def test_a_server_and_the_process_without_it_make_pictures(tmp_path: Path):
    path = tmp_path / "served.json"
    newest = CHECKOUTS[-1]
    printed = call(
        newest.path, "--rows", "ours,headless", "--profile", "--folder", tmp_path / "base", "--json", path
    )
    ours, headless = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert (ours["who"], ours["comfyui"], headless["who"]) == ("ours", newest.version, "headless")
    for row in (ours, headless):
        check(row)
    assert f"ours {newest.version} all, the first picture" in printed


@pytest.mark.nightly
@pytest.mark.skipif(
    not CHECKOUTS, reason="no ComfyUI to test against: set COMFYUI_PATH, or see docs/testing.md"
)
def test_all_versions_in_one_call(tmp_path: Path):
    """ComfyUI's own nodes know no toy: their rows fail."""
    path = tmp_path / "served.json"
    checkouts = [checkout.path for checkout in CHECKOUTS]
    call(*checkouts, "--rows", "cold,native,ours", "--profile", "--json", path, status=1)
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [row["who"] for row in rows] == ["cold", "native", "ours"] * len(CHECKOUTS)
    assert all(("error" in row) == (row["who"] == "native") for row in rows)
    for row in rows[2::3]:
        check(row)
