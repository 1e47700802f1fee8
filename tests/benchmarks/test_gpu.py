"""benchmarks/gpu.py with tiny networks on the processor, and what its figures rest on."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from cascade_nodes.tests.benchmarks.conftest import BENCHMARKS

MEASUREMENTS = {"ceilings", "forward", "profile", "picture", "error", "first", "sizes"}
# Threads that wait for each other are slower than one where tests run side by side.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COMFYUI_PATH": ""}


def run(program: str, *arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / program), *arguments]
    finished = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def results_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File of the results of every measurement of our programs."""
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    printed = run("gpu.py", "--toy", "--profile", "--programs", "ours", "--json", str(path))
    assert all(f"## {part}" in printed for part in MEASUREMENTS)
    assert "| whole picture " in printed
    return path


def test_every_part_is_kept(results_path: Path):
    results = json.loads(results_path.read_text(encoding="utf-8"))
    assert set(results) >= MEASUREMENTS
    assert set(results["forward"]["stage_c"]["programs"]) >= {"eager", "engine"}
    assert [point["side"] for point in results["sizes"]["points"]] == [64, 96, 64]
    assert results["first"]["warm"]["first"] > 0
    for programs in results["error"].values():
        for errors in programs.values():
            assert 0 < errors["forward"] < 0.05  # bf16: 0.004 is one step
            assert 0 < errors["latent"] < 0.05


def test_a_part_that_runs_again_leaves_the_others(module, tmp_path: Path, capsys: pytest.CaptureFixture):
    gpu, path = module("gpu"), tmp_path / "gpu.json"
    context = gpu.Context(module("networks").tiny(torch.device("cpu")), True, ("ours",))
    results = {"forward": "kept", "ceilings": "old"}
    assert gpu.run(context, ["ceilings"], results, path) == []
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert stored["forward"] == "kept"
    assert stored["ceilings"]["bf16_tflops"] > 0
    assert "## ceilings" in capsys.readouterr().out


def test_a_part_that_fails_leaves_those_after_it(module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gpu, path = module("gpu"), tmp_path / "gpu.json"
    context = gpu.Context(module("networks").tiny(torch.device("cpu")), True, ("ours",))
    monkeypatch.setitem(gpu.MEASUREMENTS, "forward", None)
    errors = gpu.run(context, ["forward", "ceilings"], {}, path)
    assert [error.partition(":")[0] for error in errors] == ["forward"]
    assert "ceilings" in json.loads(path.read_text(encoding="utf-8"))


def test_a_program_that_fails_leaves_the_others(module, tmp_path: Path):
    gpu, ours = module("gpu"), module("programs.ours")

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no fp8 here")

    context = gpu.Context(module("networks").tiny(torch.device("cpu")), True, ("ours",))
    context.ours.names = lambda: [ours.FP8, ours.EAGER, ours.ENGINE]
    program = context.ours.program
    failing = dataclasses.replace(program(ours.FP8), stage_c=fails, stage_b=fails)
    context.ours.program = lambda name: failing if name == ours.FP8 else program(name)
    results: dict = {}
    with torch.inference_mode():
        errors = gpu.run(context, ["forward", "picture", "error"], results, tmp_path / "gpu.json")
    assert len(errors) == 5  # a forward and the error of Stage C and of Stage B, a picture
    assert all(ours.FP8 in error and "no fp8 here" in error for error in errors)
    kinds = [results["forward"][kind]["programs"] for kind in ("stage_c", "stage_b")]
    for programs in (*kinds, results["picture"]["programs"], *results["error"].values()):
        assert set(programs) == {ours.EAGER, ours.ENGINE}


def test_an_unknown_part_is_named(module):
    gpu = module("gpu")
    with pytest.raises(argparse.ArgumentTypeError, match="speed is not one of ceilings, forward"):
        gpu.chosen("forward,speed", tuple(gpu.MEASUREMENTS))


def test_the_plots_are_drawn_from_what_is_kept(results_path: Path, tmp_path: Path):
    memory = tmp_path / "memory.json"
    limits = [{"gb": 8, "seconds": 0.9}, {"gb": 16, "seconds": 0.6}]
    memory.write_text(json.dumps({"resident": 0.6, "limits": limits}), encoding="utf-8")
    run("plots.py", "--gpu", str(results_path), "--memory", str(memory), "--folder", str(tmp_path))
    for name in ("speed.png", "sizes.png", "memory.png"):
        with Image.open(tmp_path / name) as image:
            assert image.width == 760
            assert (31, 95, 191) in {colour for _, colour in image.getcolors(1 << 20) or []}  # ours


def test_arithmetic_is_that_of_the_layers(module):
    networks, ceilings = module("networks"), module("ceilings")
    setup = networks.full(torch.device("cpu"))
    # Twice the weights of every product at every position, and attention: 8.16 TFLOP for two rows of the 3.6 B.
    assert ceilings.Arithmetic(setup)("stage_c", 1024, 2) == pytest.approx(8.16, abs=0.005)


@pytest.mark.parametrize("kind", ["stage_c", "stage_b"])
def test_random_weights_keep_every_block_in_range(module, kind: str):
    networks = module("networks")
    setup = networks.tiny(torch.device("cpu"))
    blocks = {"stage_c": [[8, 24], [24, 8]], "stage_b": [[2, 6, 28, 6], [6, 28, 6, 2]]}[kind]
    setup.configs[kind]["blocks"] = blocks  # as deep as published
    network = networks.random_network(kind, setup)
    spreads = []
    for layer in network.modules():
        if type(layer).__name__ in ("ResBlock", "AttnBlock", "TimestepBlock"):
            layer.register_forward_hook(lambda _, values, out: spreads.append(out.float().std().item()))
    x, r, values = networks.forward_inputs(kind, setup, 2, 128)
    out = network(x, r, **values)
    assert out.isfinite().all()
    assert min(spreads) > 0.1
    assert max(spreads) < 10


def test_targets_are_met_missed_or_not_measured(module):
    targets = module("targets")
    minimum = targets.Target("faster", "×", 4.5, lambda results: results["ratio"], at_least=True)
    assert minimum.row({"ratio": 4.6}) == ["faster", "4.6 ×", "≥ 4.5 ×", "met"]
    assert minimum.row({"ratio": 4.4})[-1] == "missed"
    assert minimum.row({})[-1] == "not measured"
    maximum = targets.Target("error", "", 1, lambda results: results["error"])
    assert maximum.row({"error": float("nan")})[-1] == "missed"


def test_kernels_are_told_apart_by_name(module):
    kind_of = module("measurements.profile").kind_of
    assert kind_of("nvjet_tst_128x256_64x4_1x2_h_bz_TNT") == "product"
    assert kind_of("void pytorch_flash::flash_fwd_kernel<...>") == "attention"
    assert kind_of("_depthwise_norm") == "convolution"
    assert kind_of("Memcpy DtoD (Device -> Device)") == "copy"
    assert kind_of("_response_scale") == "element-wise"
