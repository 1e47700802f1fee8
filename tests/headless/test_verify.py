"""`cascade verify`: what it says of whole, damaged, foreign and missing files, and that its numbers are diffusers'."""

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cascade_nodes.cascade_core.checkpoints import (
    NETWORKS,
    fuse_attention,
    load_model,
    split_attention,
    write_safetensors,
)
from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.cascade_core.pipeline import StableCascade
from cascade_nodes.headless.catalogue import FILES
from cascade_nodes.headless.cli import main
from cascade_nodes.headless.progress import TransferProgress
from cascade_nodes.headless.verify import files, machine, picture
from cascade_nodes.headless.verify.check_picture import check_picture
from cascade_nodes.headless.verify.expected import differences, published_shapes
from cascade_nodes.headless.verify.networks import computing_in_float32, fixed_inputs, statistics
from cascade_nodes.headless.verify.report import Report
from cascade_nodes.nodes.hosts.roles import DEMO_FOLDER
from cascade_nodes.tests.golden_weights import manifest_shapes
from cascade_nodes.tests.headless.command import errors_of, start
from cascade_nodes.tests.headless.record_verify import RECORDED, RUN
from cascade_nodes.tests.nodes.tiny import CONFIGS, write_cascade

MANIFESTS = {
    "stage_c": "stage_c_3.6b",
    "stage_c_lite": "stage_c_1b",
    "stage_b": "stage_b_1.5b",
    "stage_b_lite": "stage_b_700m",
    "text_encoder": "text_encoder_clip_bigg",
}


@pytest.fixture
def hidden(monkeypatch):
    """diffusers is not installed, whatever this environment has."""
    monkeypatch.setitem(sys.modules, "diffusers", None)


@pytest.fixture
def tiny(tmp_path):
    """A whole cascade of random weights, in ComfyUI's folders."""
    torch.manual_seed(0)
    write_cascade(tmp_path / "home" / "alice" / "models")
    return tmp_path / "home" / "alice" / "models"


@pytest.fixture
def verified(tmp_path, hidden, capsys):
    """verified(folder, options): (exit status, the report, what the terminal shows)."""

    def verify(folder: Path, *options: str) -> tuple[int, dict[str, Any], str]:
        status = main(["verify", str(folder), "--output", str(tmp_path / "out"), *options])
        reports = sorted((tmp_path / "out").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        return status, json.loads(reports[-1].read_text(encoding="utf-8")), capsys.readouterr().out

    return verify


def networks(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{file: its only network}"""
    return {file["file"]: network for file in report["files"] for network in file["networks"]}


def write_random(path: Path, name: str, dtype: torch.dtype = torch.float32) -> None:
    """A published file of random weights."""
    generator = torch.Generator().manual_seed(1)
    weights = {
        key: torch.randn(shape, generator=generator).mul_(0.02).to(dtype)
        for key, shape in published_shapes(name).items()
        if not key.endswith("num_batches_tracked")
    }
    counters = {key: torch.tensor(0) for key in published_shapes(name) if key.endswith("num_batches_tracked")}
    for key in weights:
        if key.endswith("running_var"):
            weights[key] = weights[key].abs() + 1
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, fuse_attention(weights | counters), {})


def change(path: Path, changes: Mapping[str, torch.Tensor | None]) -> None:
    """Replaces tensors of a file; None takes one away."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    tensors |= {name: tensor for name, tensor in changes.items() if tensor is not None}
    kept = {name: tensor for name, tensor in tensors.items() if changes.get(name, tensor) is not None}
    write_safetensors(path, kept, metadata)


def test_a_whole_cascade(tiny, tmp_path, verified):
    """Every file and network, the picture of the front door, nothing wrong, and no folder is named."""
    status, report, shown = verified(tiny, "--quick")
    assert (status, report["problems"], report["finished"], report["diffusers"]) == (0, [], True, None)
    paths = {path.name: path for path in tiny.rglob("*.safetensors")}
    assert {file["file"] for file in report["files"]} == set(paths)
    for file in report["files"]:
        data = paths[file["file"]].read_bytes()
        assert (file["size"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        assert file["published"] == []
    parts = {network["part"]: network for network in networks(report).values()}
    assert parts.keys() == {*CONFIGS, "text", "vision"}
    assert parts["stage_c"]["what"] == "a Stage C checkpoint (width 32)"
    assert parts["stage_c"]["dtypes"] == {"float32": parts["stage_c"]["tensors"]}
    assert all(network["non_finite"] == 0 and network["outputs"] for network in parts.values())
    text = (tmp_path / "out" / "cascade_verify.json").read_text(encoding="utf-8")
    assert not any(word in text for word in ("alice", str(tmp_path), str(Path.home()), os.sep + "tmp"))
    assert "Nothing is wrong. Please paste " in shown
    with Image.open(tmp_path / "out" / "cascade_verify.png") as saved:
        pixels = np.asarray(saved)
    with StableCascade.load(tiny) as cascade:
        stage_b: Any = picture.PictureRun.small().decoder
        options: dict[str, Any] = {"size": (512, 512), "seed": 7, "steps": 8, "cfg_rescale": 0.0}
        (expected,) = cascade(picture.PROMPT, decoder=stage_b, **options)
    assert np.array_equal(pixels, np.asarray(expected))


def test_a_second_report_is_another_file(tiny, tmp_path, verified):
    first = verified(tiny / "vae", "--no-picture")[1]
    second = verified(tiny / "vae", "--no-picture")[1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "cascade_verify.json",
        "cascade_verify_2.json",
    ]
    of_both = [networks(report) for report in (first, second)]
    assert (
        of_both[0].keys() == of_both[1].keys() == {"tiny_stage_a.safetensors", "tiny_previewer.safetensors"}
    )
    for name, network in of_both[0].items():
        assert network["outputs"] == of_both[1][name]["outputs"]


def test_the_demo_gives_what_diffusers_gives(verified, tmp_path):
    """Numbers that diffusers itself gave for the same files, inputs and noise: `record_verify.py`."""
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    status, report, _ = verified(DEMO_FOLDER, "--no-picture")
    assert status == 0
    assert not any(file["published"] for file in report["files"])
    outputs = {
        f"{name} {output}": numbers
        for name, network in networks(report).items()
        for output, numbers in network["outputs"].items()
    }
    assert len(recorded["outputs"]) == 7
    for name, theirs in recorded["outputs"].items():
        assert_equal_numbers(outputs[name], theirs, 1e-4)
    pictured = Report([DEMO_FOLDER], tmp_path / "picture")
    check_picture(pictured, RUN, "full", "fp32", "cpu", None, None, TransferProgress())
    for name, theirs in recorded["picture"].items():
        assert_equal_numbers(pictured.data["picture"][name], theirs, 1e-3)


def assert_equal_numbers(ours: Mapping[str, Any], theirs: Mapping[str, Any], tolerance: float) -> None:
    largest = max(abs(theirs["min"]), abs(theirs["max"]))
    assert ours["shape"] == theirs["shape"]
    assert ours["digest"] == theirs["digest"]
    for name in ("mean", "std", "min", "max", "values"):
        assert ours[name] == pytest.approx(theirs[name], abs=tolerance * largest)


def test_published_names_and_shapes(tmp_path, verified):
    """Files have the published sizes, any names, and random weights."""
    write_random(tmp_path / "models" / "a.safetensors", "stage_a", torch.float16)
    write_random(tmp_path / "models" / "b.safetensors", "previewer")
    status, report, shown = verified(tmp_path / "models")
    assert status == 0
    assert {file["file"]: file["published"] for file in report["files"]} == {
        "a.safetensors": ["stage_a"],
        "b.safetensors": ["previewer"],
    }
    assert all(network["as_published"] for network in networks(report).values())
    assert report["files"][0]["published_size"] == "73.7 MB"
    assert report["picture"]["skipped"].startswith("there is no text_encoder file here")
    assert "No picture was made: there is no text_encoder file here" in shown


LITE = {
    "diffusion_models/stage_c_lite_bf16.safetensors": torch.bfloat16,
    "diffusion_models/stage_b_lite_bf16.safetensors": torch.bfloat16,
    "vae/stage_a.safetensors": torch.float32,
    "vae/effnet_encoder.safetensors": torch.float32,
    "vae/previewer.safetensors": torch.float32,
    "text_encoders/text_encoder.safetensors": torch.float16,
}


@pytest.mark.nightly
def test_a_lite_cascade_of_the_published_sizes(tmp_path, verified):
    """Weights are random, under the published names; of a file of 2 GB no copy is made in memory."""
    models = tmp_path / "models"
    for name, dtype in LITE.items():
        write_random(models / name, Path(name).stem, dtype)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "c.safetensors").symlink_to(models / "diffusion_models" / "stage_c_lite_bf16.safetensors")
    process = start("verify", str(alone), "--no-picture", "--output", str(tmp_path / "out"))
    peak = 0
    while process.poll() is None:
        peak = max(peak, own_memory(process.pid))
        time.sleep(0.05)
    assert process.returncode == 0, process.communicate()
    assert peak < 1.2e9  # in float32 the weights alone would take 4.1 GB
    status, report, _ = verified(models, "--no-picture")
    assert (status, report["problems"]) == (0, [])
    assert {file["file"]: file["published"] for file in report["files"]} == {
        Path(name).name: [Path(name).stem] for name in LITE
    }
    assert all(network["as_published"] for network in networks(report).values())
    pictured, run = Report([models], tmp_path), picture.PictureRun.small(size=(256, 256), steps=(2, 1))
    check_picture(pictured, run, "lite", "bf16", "cpu", None, None, TransferProgress())
    assert pictured.problems == []
    assert pictured.data["picture"]["files"]["stage_c"] == "stage_c_lite_bf16.safetensors"
    assert pictured.data["picture"]["pixels"]["std"] > 0.01


def own_memory(pid: int) -> int:
    """Bytes of a process that are not pages of a file."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    lines = (line.split() for line in status.splitlines() if line.startswith("RssAnon:"))
    return next((int(words[1]) * 1024 for words in lines), 0)


def test_another_digest_than_the_published_one(tmp_path, verified, monkeypatch):
    write_random(tmp_path / "models" / "previewer.safetensors", "previewer")
    monkeypatch.setitem(FILES, "previewer", replace(FILES["previewer"], sha256="ab" * 32))
    status, report, _ = verified(tmp_path / "models", "--no-picture")
    assert status == 1
    assert report["files"][0]["published_sha256"] == "ab" * 32
    (problem,) = report["problems"]
    assert problem.startswith(
        "previewer.safetensors holds the network of previewer, but is not the published file"
    )


def test_what_is_wrong_is_a_sentence_and_the_rest_goes_on(tiny, tmp_path, verified):
    change(
        tiny / "vae" / "tiny_previewer.safetensors",
        {"blocks.0.weight": torch.full((16, 16, 1, 1), torch.nan)},
    )
    change(tiny / "vae" / "tiny_stage_a.safetensors", {"out_block.0.bias": None})
    stage_c = tiny / "diffusion_models" / "tiny_stage_c.safetensors"
    stage_c.write_bytes(stage_c.read_bytes()[:-100])
    status, report, shown = verified(tiny, "--no-picture")
    assert status == 1
    assert report["finished"]
    sentences = " ".join(report["problems"])
    assert len(report["problems"]) == 3
    assert "tiny_stage_c.safetensors is truncated: " in sentences
    assert (
        "tiny_previewer.safetensors holds NaN or infinity in 1 weights, such as blocks.0.weight;" in sentences
    )
    assert "1 missing (out_block.0.bias)" in sentences
    assert "alice" not in json.dumps(report)
    assert shown.count("WRONG: ") == 3
    assert {"compressor", "stage_b", "text", "vision"} <= {
        network["part"] for network in networks(report).values() if network.get("outputs")
    }


def test_names_of_a_published_network_that_differ(tmp_path, verified):
    path = tmp_path / "models" / "previewer.safetensors"
    write_random(path, "previewer")
    change(path, {"blocks.5.running_mean": None})
    _, report, _ = verified(tmp_path / "models", "--no-picture")
    assert report["problems"][0] == (
        "previewer.safetensors differs from the published previewer: 1 missing (blocks.5.running_mean)."
    )
    assert networks(report)["previewer.safetensors"]["as_published"] is False


def test_other_files_are_left_alone(tiny, tmp_path, verified):
    write_safetensors(
        tiny / "unet" / "flux.safetensors", {"double_blocks.0.img_mod.lin.weight": torch.zeros(4, 4)}, {}
    )
    write_safetensors(
        tiny / "loras" / "x.safetensors", {"lora_unet_a.lora_down.weight": torch.zeros(4, 4)}, {}
    )
    status, report, _ = verified(tiny, "--no-picture")
    assert (status, report["others"]) == (0, 2)
    assert not {"flux.safetensors", "x.safetensors"} & {file["file"] for file in report["files"]}


def test_a_name_that_is_not_text(tiny, verified):
    previewer = tiny / "vae" / "tiny_previewer.safetensors"
    previewer.rename(previewer.with_name(os.fsdecode(b"\xff\x1b[2J.safetensors")))
    status, report, shown = verified(tiny / "vae", "--no-picture")
    # safetensors opens no such path.
    assert (status, len(report["problems"]), len(report["files"])) == (1, 1, 1)
    assert report["problems"][0].startswith("\udcff\x1b[2J.safetensors")
    assert "alice" not in report["problems"][0]
    assert "\x1b" not in shown


def test_without_a_folder_the_usual_ones_are_searched(tiny, tmp_path, verified, monkeypatch):
    """They are those of `cascade models`; LoRAs are not networks."""
    monkeypatch.setenv("CASCADE_MODELS", str(tiny))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tiny)
    write_safetensors(
        tiny / "loras" / "x.safetensors", {"lora_unet_a.lora_down.weight": torch.zeros(4, 4)}, {}
    )
    assert main(["verify", "--no-picture", "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "cascade_verify.json").read_text(encoding="utf-8"))
    assert len(report["files"]) == 7
    assert report["others"] == 0


@pytest.mark.parametrize(
    ("folder", "sentence"),
    [("nothing", "nothing is not a folder"), ("empty", "No safetensors file was found under")],
)
def test_nothing_to_verify(folder, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main(["verify", folder]) == 1
    assert sentence in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


def test_no_picture_where_memory_would_not_do(tiny, verified, monkeypatch):
    """It is said before anything is loaded: the system would end the process without a word."""
    for kind in ("stage_c", "stage_b"):
        (path,) = tiny.rglob(f"tiny_{kind}.safetensors")
        halves = NETWORKS[kind].from_config(CONFIGS[kind]).bfloat16().state_dict()
        write_safetensors(path, halves, {"kind": kind, "config": json.dumps(CONFIGS[kind])})
    monkeypatch.setattr(picture, "free_memory", lambda: 300_000)
    status, report, _ = verified(tiny, "--dtype", "fp32")
    assert (status, report["problems"]) == (0, [])
    assert "are free; choose --dtype bf16 or --prefer lite." in report["picture"]["skipped"]


def test_broken_diffusers_is_one_sentence(tiny, tmp_path, capsys, monkeypatch):
    (tmp_path / "elsewhere" / "diffusers").mkdir(parents=True)
    (tmp_path / "elsewhere" / "diffusers" / "__init__.py").write_text("import nonexistent_module\n")
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    assert main(["verify", str(tiny / "vae"), "--no-picture", "--output", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "cascade_verify.json").read_text(encoding="utf-8"))
    assert report["problems"] == ["diffusers: ModuleNotFoundError: No module named 'nonexistent_module'"]
    assert len(report["files"]) == 2


def test_ctrl_c_keeps_what_was_done(tiny, tmp_path):
    process = start("verify", str(tiny), "--output", str(tmp_path / "out"))
    for line in errors_of(process):
        if "tiny_stage_b" in line:  # done; the picture takes seconds
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-2:] == [
        f"What was done so far is in {tmp_path / 'out' / 'cascade_verify.json'}.",
        "Stopped.",
    ]
    report = json.loads((tmp_path / "out" / "cascade_verify.json").read_text(encoding="utf-8"))
    assert not report["finished"]
    assert "tiny_stage_b.safetensors" in {file["file"] for file in report["files"]}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cascade_verify.json"]


@pytest.mark.parametrize("name", [*MANIFESTS, "stage_a", "previewer", "effnet_encoder", "controlnet_canny"])
def test_expected_names_are_the_published_ones(name):
    shapes = {
        key: torch.empty(shape, device="meta")
        for key, shape in manifest_shapes(MANIFESTS.get(name) or name).items()
        if not key.endswith("position_ids")
    }
    split = {key: tuple(tensor.shape) for key, tensor in split_attention(shapes).items()}
    assert differences(split, published_shapes(name)) == []


@pytest.mark.parametrize("kind", ["stage_c", "stage_b", "stage_a", "compressor", "previewer"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_compute_in_float32(kind, dtype, tmp_path):
    """They give what the network in float32 gives, to the bit; afterwards its weights are the file's pages again."""
    torch.manual_seed(2)
    write_safetensors(
        tmp_path / "x.safetensors",
        NETWORKS[kind].from_config(CONFIGS[kind]).to(dtype).state_dict(),
        {"kind": kind, "config": json.dumps(CONFIGS[kind])},
    )
    stored, whole = (
        load_model(tmp_path / "x.safetensors", kind, wanted)[0] for wanted in (None, torch.float32)
    )
    before = {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in stored.state_dict().items()}
    inputs = fixed_inputs(kind, stored)
    called: tuple[Any, Any] = (stored, whole)
    with torch.no_grad(), computing_in_float32(stored):
        if kind in ("stage_c", "stage_b"):
            ours, expected = (network(**inputs) for network in called)
        elif kind == "stage_a":
            ours, expected = (network.decode(inputs["latent"]) for network in called)
        else:
            ours, expected = (network(*inputs.values()) for network in called)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, expected)
    assert {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in stored.state_dict().items()} == before


def test_statistics_are_json_and_bear_rounding():
    values = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(3))
    numbers = statistics(values)
    assert statistics(values * (1 + 1e-6))["digest"] == numbers["digest"]
    assert statistics(values + 0.02)["digest"] != numbers["digest"]
    assert statistics(torch.zeros(1))["std"] == 0
    values[0, 0, 0] = float("nan")
    assert json.loads(json.dumps(statistics(values), allow_nan=False))["mean"] == "nan"


@pytest.mark.parametrize(
    "sentence",
    [
        "{models}/vae/x.safetensors is truncated",
        "OSError: [Errno 2] No such file: '{models}/vae/x.safetensors'",
        "{models} holds no x.safetensors",
        "failed in /usr/lib/python3/site-packages/x.safetensors",
        r"C:\Users\bob\models\x.safetensors is truncated",
    ],
)
def test_sentences_name_no_folder(sentence, tmp_path):
    report = Report([tmp_path / "models"], tmp_path)
    said = report.names_only(sentence.format(models=tmp_path / "models"), tmp_path / "models" / "vae" / "x")
    assert "x.safetensors" in said
    assert not any(mark in said for mark in (str(tmp_path), "usr", "bob", "vae"))


def test_the_machine_is_not_named():
    described = json.dumps([machine.machine(), machine.versions()])
    assert os.uname().nodename not in described
    assert str(Path.home()) not in described


def test_a_device_that_is_not_there_is_said_before_the_work(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CascadeError):
        files.roots_of(tmp_path / "nothing")
    assert main(["verify", str(tiny), "--device", "tpu"]) == 1
    assert "device is 'tpu'" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))
