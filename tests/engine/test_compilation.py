"""Kernels compiled in the background, for a card that is only described."""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from cascade_nodes.cascade_core.engine import compilation
from cascade_nodes.cascade_core.engine.card import Card, described
from cascade_nodes.cascade_core.networks.config import StageAConfig
from cascade_nodes.cascade_core.networks.stage_a import StageA

META = torch.device("meta")
CARD = Card((8, 6), "NVIDIA GeForce RTX 3060", 28)


def order(tmp_path) -> dict:
    return {
        "config": ["StageAConfig", asdict(StageAConfig())],
        "dtype": "bfloat16",
        "precision": "exact",
        "card": CARD,
        "marker": str(tmp_path / "marker"),
    }


@pytest.fixture
def stage_a(monkeypatch, tmp_path):
    """Stage A where a process would be started."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(os, "cpu_count", lambda: compilation.CORES)
    monkeypatch.setattr(compilation, "available_bytes", lambda: compilation.MEMORY)
    with META:
        return StageA(StageAConfig()).to(torch.bfloat16)


def test_the_first_forward_finds_the_kernels_of_the_process_beside_it(tmp_path):
    program = [sys.executable, "-m", "cascade_nodes.tests.engine.compiled_in_background", "StageAConfig"]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    report = json.loads(result.stdout)
    assert report.pop("found") > 3
    assert report == {"compiled": 0, "again": False}
    assert len(list(tmp_path.glob("cascade-*"))) == 1


def test_a_process_ends_with_its_parent(tmp_path):
    process = compilation.Compilation(order(tmp_path))._process
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait() == 1
    assert list(tmp_path.iterdir()) == []


def test_a_forward_does_not_wait_for_a_process_that_has_not_begun(tmp_path):
    running = compilation.Compilation(order(tmp_path))
    running.finish()
    assert running._process.wait() != 0
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_fails_is_silent(tmp_path, capfd):
    running = compilation.Compilation({**order(tmp_path), "dtype": "float7"})
    assert running._process.wait() == 1
    running.finish()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "obstacle", ["off", "cores", "memory", "no python", "frozen", "no program", "float32", "compiled"]
)
def test_where_none_is_started(monkeypatch, tmp_path, stage_a, obstacle):
    monkeypatch.setattr(compilation, "Compilation", lambda order: order)
    with described(CARD):
        started = compilation.begin(stage_a, META)
    assert isinstance(started, dict)
    assert started["card"] == CARD
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(os, "cpu_count", lambda: compilation.CORES - (obstacle == "cores"))
    monkeypatch.setattr(compilation, "available_bytes", lambda: compilation.MEMORY - (obstacle == "memory"))
    match obstacle:
        case "off":
            monkeypatch.setenv(compilation.SWITCH, "0")
        case "no python":
            monkeypatch.setattr(sys, "executable", "")
        case "frozen":
            monkeypatch.setattr(sys, "frozen", True, raising=False)
        case "no program":
            monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        case "float32":
            stage_a.float()
        case "compiled":
            (tmp_path / started["marker"]).touch()
    with described(CARD):
        assert compilation.begin(stage_a, META) is None


def test_none_is_started_without_a_card(stage_a):
    assert compilation.begin(stage_a, torch.device("cpu")) is None
