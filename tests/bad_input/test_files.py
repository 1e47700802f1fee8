"""Bad files in every loader, through the command itself: one sentence, a status of 1, nothing left behind."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from cascade_nodes.cascade_core.checkpoints import read_safetensors, write_safetensors
from cascade_nodes.cascade_core.text.encoder import build_text_model
from cascade_nodes.nodes.hosts import roles
from cascade_nodes.tests.bad_input.graphs import GRAPH, LOADERS, TINY_FILES
from cascade_nodes.tests.headless.command import start
from cascade_nodes.tests.nodes.tiny import TRANSFORMER


def spoil(file: Path, path: Path, bad: str) -> None:
    """A bad copy of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if bad == "truncated":
        path.write_bytes(file.read_bytes()[:-100])
    elif bad == "pickle":
        torch.save({"weight": torch.zeros(3)}, path)
    elif bad == "text":
        path.write_text("Not Found: the file has moved.")
    elif bad == "gguf":
        path.write_bytes(b"GGUF\x03\0\0\0" + bytes(99))
    elif bad == "foreign":
        write_safetensors(path, {"model.layers.0.weight": torch.zeros(3)}, {})


BAD = {
    "truncated": "bad.safetensors is truncated: ",
    "pickle": "bad.safetensors is a pickle (.ckpt, .pt), which can run code when opened",
    "gguf": "bad.safetensors is a GGUF file, a form that no program has for Stable Cascade; choose the network's",
    "text": "bad.safetensors is not a safetensors file: it begins with b'Not Foun'",
    "foreign": "model.layers.0.weight",
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_file_in_every_loader(kind, bad, working_folder, models, refused):
    loader, graph = LOADERS[kind]
    spoil(models / TINY_FILES[kind], working_folder / "bad.safetensors", bad)
    error_line = refused(f"{loader}=bad.safetensors", graph=graph)
    assert error_line.startswith(f"Node {loader.split('.')[0]} (")
    assert "bad.safetensors" in error_line
    assert BAD[bad] in error_line


@pytest.mark.parametrize("kind", ["Stage C", "Stage B", "Stage A", "text encoder"])
def test_a_config_that_claims_a_billion_blocks(kind, working_folder, models, refused):
    loader, graph = LOADERS[kind]
    claim = {"Stage A": {"bottleneck_blocks": 10**9}, "text encoder": {"num_hidden_layers": 10**9}}
    shutil.copytree((models / TINY_FILES[kind]).parent, working_folder / "folder")
    file = working_folder / "folder" / Path(TINY_FILES[kind]).name
    tensors, metadata = read_safetensors(file)
    config = json.loads(metadata["config"]) | claim.get(kind, {"blocks": [[10**9, 1], [1, 10**9]]})
    write_safetensors(file, tensors, {"config": json.dumps(config)})
    error_line = refused(f"{loader}={file}", graph=graph)
    assert re.search(
        r"the config in its metadata asks for \d{10,11} blocks, but there are only \d+ tensors", error_line
    )


@pytest.mark.parametrize("kind", LOADERS)
def test_a_missing_file_in_every_loader(kind, refused):
    loader, graph = LOADERS[kind]
    error_line = refused(f"{loader}=gone.safetensors", graph=graph, begun=False)
    assert f"No {kind} file 'gone.safetensors' was found under " in error_line
    assert error_line.endswith("put it there, set CASCADE_MODELS, or give its path.")


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("other_kind", TINY_FILES)
def test_a_file_of_another_kind_in_every_loader(kind, other_kind, models, refused):
    if kind == other_kind:
        return
    loader, graph = LOADERS[kind]
    file = models / TINY_FILES[other_kind]
    error_line = refused(f"{loader}={file}", graph=graph)
    assert f"{file.name} is a " in error_line
    assert other_kind in error_line
    assert f"{kind} is expected here; choose " in error_line


def test_text_states_too_wide_for_the_demo(working_folder, models, refused):
    """A text encoder of the published width with the demo's narrower Stage C."""
    demo = roles.DEMO_FOLDER / roles.DEMO_NAMES["text_encoder"]
    wide = {**TRANSFORMER, "hidden_size": 1280, "intermediate_size": 64, "projection_dim": 1280}
    wide |= {"num_hidden_layers": 1, "num_attention_heads": 20}
    wide["vocab_size"] = len(json.loads((demo / "vocab.json").read_text(encoding="utf-8")))
    folder = models.parent / "wide"
    write_safetensors(
        folder / "model.safetensors", build_text_model(wide).state_dict(), {"config": json.dumps(wide)}
    )
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(demo / name, folder)
    assert refused("1.file=demo_stage_c.safetensors", f"4.file={folder}") == (
        "Node 7 (CascadePriorSampler): positive: text states of width 1280 do not fit "
        "demo_stage_c.safetensors (Stage C), which takes 192; load the text encoder that belongs to this "
        "model."
    )


NAN = {
    "Stage C": ("clip_txt_mapper.weight", "7 (CascadePriorSampler)"),
    "Stage B": ("clip_mapper.weight", "8 (CascadeDecoderSampler)"),
    "Stage A": ("up_blocks.0.0.bias", "9 (CascadeDecode)"),
    "text encoder": ("text_model.encoder.layers.1.mlp.fc1.bias", "5 (CascadeTextEncode)"),
    "image encoder": ("visual_projection.weight", "13 (CascadeImagePrompt)"),
    "semantic compressor": ("backbone.0.0.weight", "3 (CascadeEncode)"),
    "previewer": ("blocks.0.weight", "4 (CascadeDecode)"),
}


@pytest.mark.parametrize("kind", NAN)
def test_nan_in_a_file_is_named_with_the_file(kind, working_folder, models, refused):
    loader, graph = LOADERS[kind]
    weight, description = NAN[kind]
    # A text encoder has its vocabulary beside it.
    shutil.copytree((models / TINY_FILES[kind]).parent, working_folder / "folder")
    file = working_folder / "folder" / Path(TINY_FILES[kind]).name
    tensors, metadata = read_safetensors(file)
    tensors[weight] = tensors[weight].clone()
    tensors[weight].view(-1)[0] = torch.nan
    write_safetensors(file, tensors, metadata)
    error_line = refused(f"{loader}={file}", graph=graph)
    assert error_line.startswith(f"Node {description}: The weight {weight} of {file.name}")
    assert error_line.endswith(" holds NaN or infinity; download the file again.")


def test_as_a_program_a_bad_file_gives_one_line(working_folder):
    (working_folder / "bad.safetensors").write_bytes(b"\x80\x02" + bytes(100))
    with start("run", str(GRAPH), "--set", "4.file=bad.safetensors", cwd=working_folder) as process:
        out, err = process.communicate()
    assert process.returncode == 1
    assert out == ""
    assert err == (
        "error: Node 4 (CascadeTextEncoderLoader): bad.safetensors is a pickle (.ckpt, .pt), which can run "
        "code when opened, and only safetensors files are loaded; convert it on a machine you can spare.\n"
    )
    assert not (working_folder / "output").exists()
