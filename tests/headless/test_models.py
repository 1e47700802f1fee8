"""`cascade models`: what is recognised, what is missing, what is wrong with the rest."""

import hashlib
import json
import os

import pytest
import torch

from cascade_nodes.cascade_core.checkpoints import ALL_IN_ONE, DIFFUSERS, LAYOUTS, layout_named
from cascade_nodes.headless import models
from cascade_nodes.headless.catalogue import FILES, WORKFLOWS
from cascade_nodes.headless.cli import main
from cascade_nodes.nodes.hosts import roles
from cascade_nodes.nodes.hosts.headless import folders
from cascade_nodes.tests.headless.command import start
from cascade_nodes.tests.headless.hub import Hub
from cascade_nodes.tests.headless.published import shapes_of, write_published, write_sparse
from cascade_nodes.tests.nodes.tiny import write_cascade
from cascade_nodes.tests.obstacles import permissions_respected


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The only `models` folder that is looked in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CASCADE_MODELS", raising=False)
    monkeypatch.setattr(roles, "PACK", tmp_path / "nowhere" / "pack")
    return tmp_path / "models"


def listed(capsys):
    assert main(["models", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def line_about(name, capsys):
    assert main(["models"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.strip().split("  ")[0] == name)
    return " ".join(line.split())


@pytest.mark.parametrize("name", FILES)
def test_every_published_file_is_recognised_under_another_name(root, name, capsys):
    path = root / FILES[name].folder / "sub" / "mine.SAFETENSORS"
    write_published(path, name)
    data = listed(capsys)
    paths_by_name = {
        recognised_name: entry["found"] for recognised_name, entry in data["files"].items() if entry["found"]
    }
    stage = name.removeprefix("comfyui_")
    names = [name] if stage == name else [name, f"{stage}_bf16"]  # the stages' loaders take such files too
    assert paths_by_name == {each: [str(path.relative_to(root.parent))] for each in names}
    assert data["others"] == {}


@pytest.mark.parametrize(
    ("name", "part", "number"),
    [
        (name, part, number)
        for name, part in (
            ("stage_c_lite_bf16", "stage_c"),
            ("stage_b_bf16", "stage_b"),
            ("effnet_encoder", "compressor"),
            ("previewer", "previewer"),
            ("text_encoder", "text"),
        )
        for number in range(len(LAYOUTS[part]))
    ],
)
def test_every_layout_is_recognised(root, name, part, number, capsys):
    meta = {key: torch.empty(shape, device="meta") for key, shape in shapes_of(name).items()}
    theirs = LAYOUTS[part][number].from_published(meta)
    path = root / "stable_cascade" / "theirs.safetensors"
    write_sparse(path, {key: tuple(tensor.shape) for key, tensor in theirs.items()}, "BF16")
    assert listed(capsys)["files"][name]["found"] == ["models/stable_cascade/theirs.safetensors"]


def test_sizes_are_those_of_the_networks(root):
    """The catalogue's sizes, rounded by the hub's list, against parameters times bytes."""
    for name, file in FILES.items():
        if name.startswith("comfyui_"):
            continue  # their other halves are not written here
        path = root / "one.safetensors"
        precision = "F32" if name == "image_encoder" or file.size < 10**9 else None
        write_published(path, name, precision)
        assert path.stat().st_size == pytest.approx(file.size, rel=0.01), name


def test_only_headers_are_read(root, tmp_path):
    """28 GB of files, and a process that never holds 2 GB."""
    for name in ("stage_c", "stage_b", "stage_c_bf16"):
        write_published(root / "unet" / f"{name}.safetensors", name)
    with start("models", "--json", cwd=tmp_path) as process:
        assert process.stdout is not None
        data = json.loads(process.stdout.read())
        _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    assert data["files"]["stage_c"]["found"] == ["models/unet/stage_c.safetensors"]
    assert usage.ru_maxrss < 2 * 2**20  # kB


def test_with_nothing_everything_is_missing(root, capsys):
    data = listed(capsys)
    assert not any(entry["found"] for entry in data["files"].values())
    for name, entry in data["workflows"].items():
        assert not entry["ready"]
        assert entry["missing"] == [need[0] for need in WORKFLOWS[name].needs]
        assert entry["missing_size"] == sum(FILES[file].size for file in entry["missing"])
    assert data["files"]["text_encoder"]["source"] == (
        "https://huggingface.co/stabilityai/stable-cascade/blob/main/text_encoder/model.safetensors"
    )
    assert data["roots"] == ["models", str(root.parent / "nowhere" / "pack" / "models")]


def test_a_workflow_is_ready_when_each_need_is_served(root, capsys):
    for name in ("stage_c_lite_bf16", "stage_b_lite_bf16", "stage_a"):
        write_published(root / FILES[name].folder / f"{name}.safetensors", name)
    assert line_about("text_to_image_lite_bf16", capsys) == (
        "text_to_image_lite_bf16 text to image, lite, 16 bits: missing text_encoder (1.39 GB)"
    )
    write_published(root / "clip" / "te.safetensors", "text_encoder")
    assert line_about("text_to_image_lite_bf16", capsys) == (
        "text_to_image_lite_bf16 text to image, lite, 16 bits: ready"
    )
    assert line_about("image_to_image", capsys).endswith(": missing effnet_encoder (81.5 MB)")
    assert line_about("text_to_image", capsys).endswith(": missing stage_c, stage_b (20.6 GB)")
    assert line_about("text_encoder", capsys) == "text_encoder 1.39 GB models/clip/te.safetensors"


@pytest.mark.parametrize("precision", ["F16", "F8_E4M3", "F8_E5M2"])
def test_a_conversion_serves_as_the_16_bit_file(root, precision, capsys):
    write_published(root / "unet" / "converted.safetensors", "stage_c", precision)
    data = listed(capsys)
    assert data["files"]["stage_c_bf16"]["found"] == ["models/unet/converted.safetensors"]
    assert data["files"]["stage_c"]["found"] == []


def test_float32_serves_for_16_bits_but_not_the_other_way(root, capsys):
    write_published(root / "unet" / "c.safetensors", "stage_c")
    write_published(root / "unet" / "b.safetensors", "stage_b_bf16")
    data = listed(capsys)["workflows"]
    assert data["text_to_image_bf16"]["missing"] == ["stage_a", "text_encoder"]
    assert data["text_to_image"]["missing"] == ["stage_b", "stage_a", "text_encoder"]


def test_every_copy_is_listed_in_the_order_of_the_roots(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CASCADE_MODELS", f"first{os.pathsep}second")
    for place in ("second", "models", "first"):
        write_published(tmp_path / place / "vae" / f"{place}.safetensors", "stage_a")
    assert listed(capsys)["files"]["stage_a"]["found"] == [
        "first/vae/first.safetensors",
        "second/vae/second.safetensors",
        "models/vae/models.safetensors",
    ]


def test_a_checkpoint_serves_with_all_it_holds(root, capsys):
    """The checkpoint loader gives every network of an all-in-one file, and of a diffusers folder."""

    def names(name, part, layout):
        meta = {key: torch.empty(shape, device="meta") for key, shape in shapes_of(name).items()}
        theirs = layout_named(part, layout).from_published(meta)
        return {key: tuple(tensor.shape) for key, tensor in theirs.items()}

    all_in_one = names("stage_c", "stage_c", ALL_IN_ONE) | names("text_encoder", "text", ALL_IN_ONE)
    write_sparse(root / "checkpoints" / "c.safetensors", all_in_one, "BF16")
    pipeline = root / "diffusers" / "decoder"
    write_sparse(pipeline / "decoder" / "model.safetensors", names("stage_b", "stage_b", DIFFUSERS), "BF16")
    write_published(pipeline / "vqgan" / "model.safetensors", "stage_a")
    data = listed(capsys)
    assert data["files"]["text_encoder"]["found"] == ["models/checkpoints/c.safetensors"]
    assert data["files"]["stage_a"]["found"] == []  # no pipeline yet
    (pipeline / "model_index.json").write_text("{}")
    data = listed(capsys)
    assert data["files"]["stage_a"]["found"] == ["models/diffusers/decoder/vqgan/model.safetensors"]
    assert data["workflows"]["text_to_image_bf16"]["ready"]


def test_a_file_in_a_folder_of_other_roles_is_said_to_lie_wrong(root, capsys):
    write_published(root / "diffusion_models" / "a.safetensors", "stage_a")
    data = listed(capsys)
    assert data["files"]["stage_a"]["found"] == []
    assert data["others"] == {
        "models/diffusion_models/a.safetensors": (
            "a.safetensors is Stage A: latents to pixels, but its loader looks in vae; move it there."
        )
    }


def test_other_networks_are_said_for_what_they_are(root, capsys):
    write_cascade(root)
    data = listed(capsys)
    assert not any(entry["found"] for entry in data["files"].values())
    descriptions = {os.path.basename(path): description for path, description in data["others"].items()}
    assert descriptions["tiny_stage_c.safetensors"] == (
        "tiny_stage_c.safetensors is a Stage C checkpoint (width 32)."
    )
    assert descriptions["model.safetensors"] == "model.safetensors is a text encoder (width 64)."
    assert (
        descriptions["tiny_vision.safetensors"] == "tiny_vision.safetensors is an image encoder (width 64)."
    )


def test_what_is_no_network_of_ours_or_broken_says_why(root, capsys):
    write_sparse(root / "unet" / "flux.safetensors", {"double_blocks.0.img_mod.lin.weight": (4, 4)}, "BF16")
    write_published(root / "unet" / "half.safetensors", "stage_c")
    with (root / "unet" / "half.safetensors").open("rb+") as file:
        file.truncate(10**9)
    (root / "vae").mkdir()
    (root / "vae" / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    (root / "vae" / "pickle.ckpt").write_bytes(b"\x80\x02")
    descriptions = listed(capsys)["others"]
    assert sorted(descriptions) == [
        "models/unet/flux.safetensors",
        "models/unet/half.safetensors",
        "models/vae/pointer.safetensors",
    ]
    assert "is truncated: 1000000000 of " in descriptions["models/unet/half.safetensors"]
    assert "Git LFS's pointer" in descriptions["models/vae/pointer.safetensors"]
    assert main(["models"]) == 0
    assert "  models/unet/half.safetensors: models/unet/half.safetensors is truncated" in (
        capsys.readouterr().out
    )


def test_names_do_not_speak_to_a_terminal(root, capsys):
    (root / "vae").mkdir(parents=True)
    name = os.fsdecode(b"\xff\x1b[2J.safetensors")
    (root / "vae" / name).write_bytes(b"xx")
    os.mkfifo(root / "vae" / "pipe.safetensors")
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"\udcff\x1b[2J.safetensors holds 2 bytes, which is not a safetensors file" in out
    assert "pipe" not in out
    assert f"models/vae/{name}" in listed(capsys)["others"]


def test_what_cannot_be_read_does_not_hide_the_rest(root, capsys):
    write_published(root / "vae" / "a.safetensors", "stage_a")
    write_published(root / "vae" / "previewer.safetensors", "previewer")
    write_published(root / "unet" / "c.safetensors", "stage_c")
    (root / "vae" / "previewer.safetensors").chmod(0)
    (root / "unet").chmod(0)
    try:
        with permissions_respected():
            data = listed(capsys)
    finally:
        (root / "unet").chmod(0o700)
    assert data["files"]["stage_a"]["found"] == ["models/vae/a.safetensors"]
    assert "cannot be read (Permission denied)" in data["others"]["models/vae/previewer.safetensors"]


def test_a_part_is_listed_with_what_has_arrived(root, capsys):
    (root / "vae").mkdir(parents=True)
    (root / "vae" / ".stage_a.safetensors.0123456789abcdef.part").write_bytes(b"\0" * 1_500_000)
    assert listed(capsys)["files"]["stage_a"]["arrived"] == 1_500_000
    assert line_about("stage_a", capsys).endswith("; 1.5 MB have arrived, `cascade fetch stage_a` goes on)")


def test_of_a_workflow_only_what_is_missing_is_fetched(root, capsys):
    for name in ("stage_c_lite", "stage_b_lite_bf16", "text_encoder"):
        write_published(root / "stable_cascade" / f"{name}.safetensors", name)
    write_published(root.parent / "a.safetensors", "stage_a")
    content = (root.parent / "a.safetensors").read_bytes()
    hub = Hub({("stabilityai/stable-cascade", "stage_a.safetensors"): content})
    try:
        assert main(["fetch", "text_to_image_lite_bf16", "--endpoint", hub.url]) == 0
        out, err = capsys.readouterr()
        assert out == "models/vae/stage_a.safetensors\n"
        assert err.startswith("stage_a (73.7 MB) of ")
        saved = hashlib.sha256((root / "vae" / "stage_a.safetensors").read_bytes())
        assert saved.hexdigest() == hashlib.sha256(content).hexdigest()
        requests = len(hub.asked)
        assert main(["fetch", "text_to_image_lite_bf16", "--endpoint", hub.url]) == 0
        out, err = capsys.readouterr()
        assert (out, err) == ("", "Nothing is missing; `cascade models` lists what is found where.\n")
        assert len(hub.asked) == requests
    finally:
        hub.stop()


def test_comfyuis_models_come_before_our_own(tmp_path, monkeypatch):
    monkeypatch.delenv("CASCADE_MODELS", raising=False)
    comfyui = tmp_path / "ComfyUI"
    (comfyui / "models").mkdir(parents=True)
    monkeypatch.setattr(roles, "PACK", comfyui / "custom_nodes" / "cascade-nodes")
    assert folders.roots()[0] == models.new_files_root() == comfyui / "models"
    monkeypatch.setattr(roles, "PACK", comfyui / "elsewhere" / "cascade-nodes")
    assert comfyui / "models" not in folders.roots()
    monkeypatch.setenv("CASCADE_MODELS", "stated")
    monkeypatch.setattr(roles, "PACK", comfyui / "custom_nodes" / "cascade-nodes")
    assert [str(root) for root in folders.roots()[:2]] == ["stated", str(comfyui / "models")]


def test_the_demo_is_ready_where_its_weights_are(root, tmp_path, monkeypatch, capsys):
    assert line_about("demo", capsys).endswith(": ready")
    assert listed(capsys)["demo"] is True
    monkeypatch.setattr(roles, "DEMO_FOLDER", tmp_path)
    assert "demo/weights are missing" in line_about("demo", capsys)
    assert listed(capsys)["demo"] is False
