"""benchmarks/served.py: pictures of real servers with tiny networks on the processor, and what it derives of them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

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
        # The same bytes and kernels, but the kernels a second later, so they do not hide the copies.
        ([(PINNED, 0, 0.05, 25 * 10**8), ("gemm", 1.0, 1.1, 0)], 0.05),
    ],
)
def test_slower_buses_are_predicted(module, tmp_path: Path, events: list[Any], longer: float):
    traced = module("copies").Traced(write_trace(tmp_path / "trace", events))
    assert traced.slower(25) == pytest.approx(longer, abs=1e-6)


def test_a_row_that_fails_leaves_the_others(tmp_path: Path):
    """Two checkouts, neither of which starts."""
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


ROW = {"comfyui": "0.33.0", "memory": None, "flags": [], "compiled": True}


def test_promises_are_read_from_the_rows_of_a_version(module, capsys: pytest.CaptureFixture):
    rows = [
        {**ROW, "who": "ours", "seed": 0.7, "prompt": 1.2, "first": 4.0},
        {**ROW, "who": "native", "seed": 6.0, "prompt": 5.0},
        {**ROW, "who": "ours", "memory": 8.0, "seed": 1.0, "error": "out of memory"},
        {**ROW, "who": "headless", "comfyui": None, "prompt": 0.5, "png": 0.1},
        {**ROW, "who": "ours", "comfyui": "0.3.64", "seed": 0.9, "compiled": False, "first": 4.0},
    ]
    targets = module("served_targets")
    told = {(version, name): (measured, met) for version, name, measured, _, met in targets.compared(rows)}
    assert told["0.33.0", "as it comes, new seed"] == ("0.7 s", "met")
    assert told["0.33.0", "as it comes, new prompt"] == ("1.2 s", "missed")
    assert told["0.33.0", "faster than ComfyUI's own nodes, new prompt"] == ("4.17 ×", "missed")
    assert told["0.33.0", "first picture, compiled before"] == ("4 s", "met")
    assert told["0.33.0", "8 GB"] == ("", "not measured")
    assert told["0.3.64", "as it comes, new seed"] == ("0.9 s", "missed")
    assert told["0.3.64", "first picture, compiled before"] == ("", "not measured")
    assert told["", "without ComfyUI, text and PNG included"] == ("0.6 s", "met")
    assert ("0.33.0", "8 GB --disable-dynamic-vram") not in told
    assert not targets.report(rows)
    assert (
        "OUTSIDE ITS BOUND: 0.33.0 as it comes, new prompt: 1.2 s, promised ≤ 1 s" in capsys.readouterr().out
    )


def test_the_table_has_every_row_that_is_promised(module, monkeypatch: pytest.MonkeyPatch):
    """Given rows in which every quantity is one second, the table has a row for every promise."""
    targets = module("served_targets")
    quantities = dict.fromkeys(("seed", "prompt", "png", "first"), 1.0)
    rows = [
        {"who": who, "memory": memory, "flags": list(flags), "compiled": True, **quantities}
        | {"comfyui": None if who == "headless" else "0.33.0"}
        for who, memory, flags in targets.TABLE
    ]
    told = targets.compared(rows)
    assert len(told) == len(targets.SERVED) + len(targets.WITHOUT_COMFYUI)
    assert "not measured" not in {met for *_, met in told}


def test_pages_and_figures_are_those_of_the_committed_measurement(module, tmp_path: Path):
    pages = module("served_pages")
    measured = pages.Measured(pages.read([pages.MEASURED]))
    for page, (words, images) in pages.PAGES.items():
        text = page.read_text(encoding="utf-8")
        assert "<!-- served " in text
        assert pages.fill(text, measured, words, images) == text, "run benchmarks/served_pages.py"
        for picture in re.findall(r"\]\((\S*served\S*\.svg)\)", text):
            assert (page.parent / picture).exists()
    pages.draw(measured, tmp_path)
    for drawn in tmp_path.iterdir():
        assert drawn.read_bytes() == (pages.IMAGES / drawn.name).read_bytes(), (
            "run benchmarks/served_pages.py"
        )


def test_pages_show_limits_versions_and_failures(module, tmp_path: Path):
    pages = module("served_pages")
    card = {
        "device": "cuda:0 NVIDIA H200",
        "allocator": "native",
        "torch": "2.11.0+cu130",
        "date": "2026-11-30T01:00",
    }
    limited = {"memory": 8.0, "seed": 1.3, "predicted": {"12": 2.6, "25": 1.9}, "copies": {"gb": 5.25}}
    rows = [
        {**card, **ROW, "who": "ours", "seed": 0.7},
        {**card, **ROW, "who": "ours", **limited},
        {**card, **ROW, "who": "native", "memory": 8.0, "seed": 8.4},
        {**card, **ROW, "who": "ours", "comfyui": "0.3.64", "seed": 0.75},
        {**card, **ROW, "who": "mixed", "error": "out of memory"},
    ]
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    files[0].write_text(json.dumps({"rows": [*rows[1:], {**rows[0], "seed": 0.9}]}), encoding="utf-8")
    files[1].write_text(json.dumps({"rows": rows[:1]}), encoding="utf-8")
    measured = pages.Measured(pages.read(files))
    whole_card = pages.Measured([*rows, {**rows[2], "memory": None}])
    assert "takes 0.70 s on an NVIDIA H200" in pages.pitch(whole_card, pages.ENGLISH)
    assert "| this pack's nodes, 0.33.0 | 0.70 s |" in pages.whole(measured, pages.ENGLISH)
    assert "| 8 GB | 1.30 s | 5.25 GB | 1.90 s | 2.60 s | 8.4 s |" in pages.by_memory(measured, pages.ENGLISH)
    assert "| this pack's nodes, 0.3.64 | 0.75 s |" in pages.whole(measured, pages.ENGLISH)
    assert "failed |" in pages.everything(measured, pages.ENGLISH)
    assert "NVIDIA H200, torch 2.11.0, 30 November 2026; ComfyUI 0.33.0, 0.3.64" in pages.place(
        measured, pages.ENGLISH
    )
    pages.draw(measured, tmp_path)
    root = ElementTree.fromstring((tmp_path / "served_by_memory.svg").read_text(encoding="utf-8"))
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"seconds, 0.33.0", "seconds, 0.3.64", "ComfyUI's own nodes", "8", "all"} <= set(texts)


def test_what_the_budget_cuts_off_replaces_nothing(tmp_path: Path):
    """A server that does not come up."""
    (tmp_path / "comfyui_version.py").write_text('__version__ = "1.0.0"\n')
    (tmp_path / "main.py").write_text("import time; time.sleep(100)\n")
    path = tmp_path / "served.json"
    earlier = {"rows": [{"who": "ours", "comfyui": "1.0.0", "memory": None, "flags": [], "seed": 0.7}]}
    path.write_text(json.dumps(earlier), encoding="utf-8")
    printed = call(tmp_path, "--rows", "ours,native", "--budget", "8", "--json", path, status=1)
    assert json.loads(path.read_text(encoding="utf-8")) == earlier
    assert "LEFT OUT, since 8 seconds were over: ours 1.0.0 all; native 1.0.0 all" in printed


def check(row: dict[str, Any]) -> None:
    assert "error" not in row
    assert {"seed", "prompt", "png", "first", "allocator", "torch", "date", "machine", "pack"} <= row.keys()
    assert {name: len(times) for name, times in row["times"].items()} == {"seed": 1, "prompt": 1, "png": 1}
    assert row["picture"]["png_bytes"] > 100
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
    asked = (newest.path, "--rows", "ours,headless", "--folder", tmp_path / "base", "--json", path)
    assert f"ours {newest.version} all, the first picture" in call(*asked, "--profile")
    assert "headless all: {" not in call(*asked, "--resume")
    ours, headless = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert (ours["who"], ours["comfyui"], headless["who"]) == ("ours", newest.version, "headless")
    for row in (ours, headless):
        check(row)


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
    versions = [checkout.version for checkout in CHECKOUTS]
    asked = [(who, version) for who in ("cold", "native", "ours") for version in versions]
    assert [(row["who"], row["comfyui"]) for row in rows] == asked
    assert all(("error" in row) == (row["who"] == "native") for row in rows)
    for row in rows[-len(versions) :]:
        check(row)
