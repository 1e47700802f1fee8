"""Bad input through the command itself: one sentence, a status of 1, nothing half-written.

The graph is the shipped one, with tiny random networks where something has to run. What is refused before a
node runs is in tests/headless (graphs) and tests/nodes (sockets) in more detail, files in tests/core.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from cascade_nodes.cascade_core.checkpoints import read_safetensors, write_safetensors
from cascade_nodes.cascade_core.text import build_text_model
from cascade_nodes.headless.cli import main
from cascade_nodes.nodes.hosts import roles
from cascade_nodes.tests.headless.command import start
from cascade_nodes.tests.headless.record_comfyui import node
from cascade_nodes.tests.nodes.tiny import TRANSFORMER, write_cascade
from cascade_nodes.tests.obstacles import permissions_respected

GRAPH = Path(__file__).parents[1] / "example_workflows" / "api" / "text_to_image.json"
TINY = [
    "1.file=tiny_stage_c.safetensors", "2.file=tiny_stage_b.safetensors", "3.file=tiny_stage_a.safetensors",
    "4.file=tiny_text_encoder", "6.width=64", "6.height=64", "7.steps=1", "8.steps=1",
]  # fmt: skip

# Every loader's input, by the kind of file it takes, and the graph that has it.
LOADERS = {
    "Stage C": ("1.file", "picture.json"),
    "Stage B": ("2.file", "picture.json"),
    "Stage A": ("3.file", "picture.json"),
    "text encoder": ("4.file", "picture.json"),
    "image encoder": ("11.file", "picture.json"),
    "semantic compressor": ("1.file", "compress.json"),
    "previewer": ("1.previewer", "compress.json"),
}
TINY_FILES = {
    "Stage C": "diffusion_models/tiny_stage_c.safetensors",
    "Stage B": "unet/tiny_stage_b.safetensors",
    "Stage A": "vae/tiny_stage_a.safetensors",
    "text encoder": "text_encoders/tiny_text_encoder/model.safetensors",
    "semantic compressor": "stable_cascade/tiny_compressor.safetensors",
    "previewer": "vae/tiny_previewer.safetensors",
    "image encoder": "clip_vision/tiny_vision.safetensors",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_cascade(folder)
    return folder


@pytest.fixture
def here(tmp_path, models, monkeypatch):
    """The current folder, with a picture, graphs that have every loader between them, and the tiny networks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CASCADE_MODELS", str(models))
    picture = json.loads(GRAPH.read_text(encoding="utf-8"))
    picture["7"]["inputs"]["positive"] = ["13", 0]
    picture |= {
        "11": node("CascadeVisionLoader", file="tiny_vision.safetensors"),
        "12": node("LoadImage", image="in.png"),
        "13": node(
            "CascadeImagePrompt", conditioning=["5", 0], clip_vision=["11", 0], image=["12", 0], strength=1
        ),
    }
    files = {"file": "tiny_compressor.safetensors", "previewer": "tiny_previewer.safetensors"}
    compress = {
        "1": node("CascadeCompressorLoader", **files),
        "2": node("LoadImage", image="in.png"),
        "3": node("CascadeEncode", vae=["1", 0], image=["2", 0], compression=32),
        "4": node("CascadeDecode", vae=["1", 0], samples=["3", 0], tile_size=0),
        "5": node("SaveImage", images=["4", 0], filename_prefix="seen"),
    }
    for name, graph in (("picture.json", picture), ("compress.json", compress)):
        (tmp_path / name).write_text(json.dumps(graph))
    Image.new("RGB", (64, 64), (200, 30, 30)).save("in.png")
    return tmp_path


def command(graph: Path | str, *assignments: str, output: str = "output") -> list[str]:
    """`cascade run` with these assignments, and with the tiny networks in the shipped graph."""
    given = [*assignments] if graph == "compress.json" else [*TINY, *assignments]
    return ["run", str(graph), "--output", output, *(option for text in given for option in ("--set", text))]


@pytest.fixture
def refused(here, capsys):
    """Runs a graph that must fail; gives the one sentence that was said."""

    def run(
        *assignments: str, graph: Path | str = GRAPH, output: str = "output", begun: bool | None = None
    ) -> str:
        before = sorted(here.rglob("*"))
        assert main(command(graph, *assignments, output=output)) == 1
        out, err = capsys.readouterr()
        progress = [line for line in err.splitlines() if line.startswith("[")]
        (said,) = (line for line in err.splitlines() if line not in progress)
        assert out == ""
        assert sorted(here.rglob("*")) == before, "nothing was left behind"
        assert begun is None or begun == bool(progress)
        assert said.startswith("error: ")
        assert said.endswith(".")
        return said.removeprefix("error: ")

    return run


@pytest.mark.parametrize("graph", [GRAPH, "picture.json", "compress.json"])
def test_the_graphs_are_good_where_nothing_is_bad(graph, here, capsys):
    assert main(command(graph)) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert (here / line.split("  ")[0]).is_file()


def spoil(file: Path, path: Path, bad: str) -> None:
    """A bad copy of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if bad == "truncated":
        path.write_bytes(file.read_bytes()[:-100])
    elif bad == "pickle":
        torch.save({"weight": torch.zeros(3)}, path)
    elif bad == "text":
        path.write_text("Not Found: the file has moved.")
    elif bad == "foreign":
        write_safetensors(path, {"model.layers.0.weight": torch.zeros(3)}, {})


BAD = {
    "truncated": "bad.safetensors is truncated: ",
    "pickle": "bad.safetensors is a pickle (.ckpt, .pt), which can run code when opened",
    "text": "bad.safetensors is no safetensors file: it begins with b'Not Foun'",
    "foreign": "model.layers.0.weight",
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_file_in_every_loader(kind, bad, here, models, refused):
    loader, graph = LOADERS[kind]
    spoil(models / TINY_FILES[kind], here / "bad.safetensors", bad)
    said = refused(f"{loader}=bad.safetensors", graph=graph)
    assert said.startswith(f"Node {loader.split('.')[0]} (")
    assert "bad.safetensors" in said
    assert BAD[bad] in said


@pytest.mark.parametrize("kind", LOADERS)
def test_a_missing_file_in_every_loader(kind, refused):
    loader, graph = LOADERS[kind]
    said = refused(f"{loader}=gone.safetensors", graph=graph, begun=False)
    assert f"No {kind} file 'gone.safetensors' was found under " in said
    assert said.endswith("put it there, set CASCADE_MODELS, or give its path.")


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("other", TINY_FILES)
def test_a_file_of_another_kind_in_every_loader(kind, other, models, refused):
    if kind == other:
        return
    loader, graph = LOADERS[kind]
    file = models / TINY_FILES[other]
    said = refused(f"{loader}={file}", graph=graph)
    assert f"{file.name} is a " in said
    assert other in said
    assert f"{kind} is expected here; choose " in said


def test_text_states_too_wide_for_the_demo(here, models, refused):
    """The published text encoder's width before the demo's own Stage C."""
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


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        (
            "7.latent=[\"8\", 0]",
            "The graph runs in a circle, 8 (CascadeDecoderSampler) -> 7 (CascadePriorSampler) -> "
            "8 (CascadeDecoderSampler); take out one of these connections.",
        ),
        (
            "7.model=[\"99\", 0]",
            "Node 7 (CascadePriorSampler): input 'model' is connected to ['99', 0], but there is no node 99 "
            "in the graph.",
        ),
        (
            "7.model=[\"3\", 0]",
            "Node 7 (CascadePriorSampler): input 'model' is connected to output 0 of node 3, which gives "
            "VAE, but it takes MODEL.",
        ),
        ("7.steps=many", "Node 7 (CascadePriorSampler): input 'steps' is 'many', but it takes INT."),
        ("7.cfg=NaN", "Node 7 (CascadePriorSampler): input 'cfg' is nan, but it takes FLOAT."),
        ("6.width=wide", "Node 6 (CascadeEmptyLatent): input 'width' is 'wide', but it takes INT."),
        (
            "7.steps=0",
            "Node 7 (CascadePriorSampler): input 'steps' is 0, but it must be between 1 and 10000.",
        ),
        (
            "8.denoise=1.5",
            "Node 8 (CascadeDecoderSampler): input 'denoise' is 1.5, but it must be between 0.0 and 1.0.",
        ),
        (
            f"8.seed={2**64}",
            f"Node 8 (CascadeDecoderSampler): input 'seed' is {2**64}, but it must be between 0 and "
            f"{2**64 - 1}.",
        ),
        (
            "7.sampler=euler",
            "Node 7 (CascadePriorSampler): input 'sampler' is 'euler', but it must be one of: ddpm, ddim, "
            "lcm, dpmpp_2m.",
        ),
        *[
            (
                f"6.width={width}",
                f"Node 6 (CascadeEmptyLatent): inputs 'width', 'height': the size is {width} × 64, but each "
                f"side must be a multiple of 8 from 8 to 16384, such as {near} × 64.",
            )
            for width, near in ((0, 8), (-64, 8), (100, 96), (99_999, 16384))
        ],
        (
            "1.file=",
            "Node 1 (StageCLoader): input 'file': No Stage C file is chosen; choose one in the loader.",
        ),
    ],
)  # fmt: skip
def test_values_that_are_refused_before_anything_runs(assignment, sentence, refused):
    assert refused(assignment, begun=False) == sentence


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda graph: graph["7"]["inputs"].pop("seed"),
            "Node 7 (CascadePriorSampler): the required input 'seed' is missing; give it a value or connect "
            "it.",
        ),
        (
            lambda graph: graph["7"].update(class_type="CascadeSampler"),
            "Node 7: there is no node 'CascadeSampler'; did you mean CascadePriorSampler?",
        ),
        (
            lambda graph: graph["7"].update(class_type="KSampler"),
            "Node 7: there is no node 'KSampler'; `cascade nodes` lists those there are.",
        ),
    ],
)
def test_graphs_that_are_refused_before_anything_runs(change, sentence, here, capsys):
    graph = json.loads(GRAPH.read_text(encoding="utf-8"))
    change(graph)
    (here / "graph.json").write_text(json.dumps(graph))
    assert main(["run", "graph.json"]) == 1
    assert capsys.readouterr() == ("", f"error: {sentence}\n")
    assert not (here / "output").exists()


def test_a_picture_too_small_for_stage_b(refused):
    assert refused("6.width=8") == (
        "Node 8 (CascadeDecoderSampler): The picture is 8 × 64 pixels, but tiny_stage_b.safetensors (Stage "
        "B) makes none with a side under 16; choose a larger width and height."
    )


@pytest.mark.parametrize(
    "prompt", ["", " ".join(f"star{number}" for number in range(10_000))], ids=["empty", "10,000 words"]
)
def test_prompts_that_are_allowed(prompt, here, capsys):
    assert main(command(GRAPH, f"5.positive={prompt}")) == 0
    (line,) = capsys.readouterr().out.splitlines()
    with Image.open(line.split("  ")[0]) as picture:
        assert picture.size == (64, 64)


def test_a_prompt_that_is_no_text(refused):
    """As from a terminal that does not write UTF-8."""
    assert refused("5.negative=caf\udce9") == (
        "Node 5 (CascadeTextEncode): negative holds '\\udce9', which is no character; write the prompt in "
        "UTF-8."
    )


def test_weights_in_a_prompt_too_large_for_floats(refused):
    assert refused("5.positive=(red:3e38) (star:-3e38)") == (
        "Node 5 (CascadeTextEncode): What the text encoder gives for positive holds NaN or infinity, though "
        "none of the weights does; lower the weights in the prompt."
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
def test_nan_in_a_file_is_named_with_the_file(kind, here, models, refused):
    loader, graph = LOADERS[kind]
    weight, where = NAN[kind]
    shutil.copytree((models / TINY_FILES[kind]).parent, here / "folder")  # a text encoder has a vocabulary
    file = here / "folder" / Path(TINY_FILES[kind]).name
    tensors, metadata = read_safetensors(file)
    tensors[weight] = tensors[weight].clone()
    tensors[weight].view(-1)[0] = torch.nan
    write_safetensors(file, tensors, metadata)
    said = refused(f"{loader}={file}", graph=graph)
    assert said.startswith(f"Node {where}: The weight {weight} of {file.name}")
    assert said.endswith(" holds NaN or infinity; download the file again.")


def test_a_folder_that_must_not_be_written_to_is_found_before_the_work(here, refused):
    (here / "locked").mkdir(mode=0o555)
    (here / "file").write_bytes(b"")
    with permissions_respected():
        for folder, reason in (
            ("locked", "Permission denied"),
            ("locked/new", "Permission denied"),
            ("file", "Not a directory"),
        ):
            assert refused(output=folder, begun=False) == (
                f"Cannot save {folder}: {reason}; choose a folder that can be written to (--output)."
            )


def test_files_and_folders_that_must_not_be_read(here, models, refused, monkeypatch):
    shutil.copytree(models / "text_encoders" / "tiny_text_encoder", here / "encoder")
    shutil.copy(models / TINY_FILES["Stage C"], here / "c.safetensors")
    (here / "c.safetensors").chmod(0)
    (here / "closed").mkdir(mode=0)
    (here / "encoder" / "merges.txt").chmod(0)
    monkeypatch.setenv("CASCADE_MODELS", f"{here / 'closed'}{os.pathsep}{models}")
    with permissions_respected():
        assert refused("1.file=c.safetensors") == (
            "Node 1 (StageCLoader): c.safetensors cannot be read (Permission denied); make it readable or "
            "choose another."
        )
        assert "'closed/c.safetensors' was found" in refused("1.file=closed/c.safetensors", begun=False)
        assert refused("4.file=encoder") == (
            "Node 4 (CascadeTextEncoderLoader) cannot use encoder/merges.txt: Permission denied; check that "
            "it exists and that you may use it."
        )
    (here / "closed").chmod(0o755)


def test_as_a_program_a_bad_file_gives_one_line(here):
    (here / "bad.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    with start("run", str(GRAPH), "--set", "4.file=bad.safetensors", cwd=here) as process:
        out, err = process.communicate()
    assert process.returncode == 1
    assert out == ""
    assert err == (
        "error: Node 4 (CascadeTextEncoderLoader): bad.safetensors is a pickle (.ckpt, .pt), which can run "
        "code when opened, and only safetensors files are loaded; convert it on a machine you can spare.\n"
    )
    assert not (here / "output").exists()


def test_as_a_program_whose_output_goes_to_a_full_disk(here):
    (here / "graph.json").write_text(
        json.dumps(
            {
                "1": node("LoadImage", image="in.png"),
                "2": node("SaveImage", images=["1", 0], filename_prefix="a"),
            }
        )
    )
    with open("/dev/full", "wb") as full, start("run", "graph.json", cwd=here, stdout=full) as process:
        _, err = process.communicate()
    assert process.returncode == 1
    assert err.splitlines()[2:] == ["error: the output cannot be written to (No space left on device)."]
    assert [path.name for path in (here / "output").iterdir()] == ["a_00001_.png"], "the picture is there"
