"""The command line, in this process and as a program."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from cascade_nodes.headless.cli import main
from cascade_nodes.tests.headless.command import errors_of, start
from cascade_nodes.tests.headless.record_comfyui import node
from cascade_nodes.tests.nodes.tiny import write_cascade

COPY = {
    "1": node("LoadImage", image="in.png"),
    "2": node("SaveImage", "Result", images=["1", 0], filename_prefix="out"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a graph and a picture that does not compress."""
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save("in.png")
    write(COPY)
    return tmp_path


def write(graph):
    with open("graph.json", "w") as stream:
        json.dump(graph, stream)


def failing(*arguments, capsys):
    """What a command that fails says on standard error."""
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_a_graph_runs_and_says_where_the_picture_is_and_how_long_it_took(folder, capsys):
    assert main(["run", "graph.json"]) == 0
    out, err = capsys.readouterr()
    path, seconds = out.rstrip("\n").split("  ")
    assert path == "output/out_00001_.png"
    assert 0 <= float(seconds.removeprefix("(").removesuffix(" s)")) < 60
    assert [line.rsplit("  ", 1)[0] for line in err.splitlines()] == [
        "[1/2] 1 (LoadImage)",
        "[2/2] 2 (SaveImage)",
    ]
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open("in.png")))


def test_set_input_and_output(folder, capsys):
    (folder / "pictures").mkdir()
    (folder / "in.png").rename(folder / "pictures" / "other.png")
    options = ["--input", "pictures", "--output", "made", "--set", "Result.filename_prefix=a/b"]
    assert main(["run", "graph.json", "--set", "LoadImage.image=other.png", *options]) == 0
    assert capsys.readouterr().out.startswith("made/a/b_00001_.png  (")


def test_valid_outputs_are_made_beside_invalid_ones(folder, capsys):
    write(COPY | {"3": node("SaveImage", images=["1", 5], filename_prefix="b")})
    assert main(["run", "graph.json"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("output/out_00001_.png  (")
    assert err.splitlines()[-1] == (
        "error: Node 3 (SaveImage): input 'images' is connected to ['1', 5], "
        "but node 1 (LoadImage) has 2 outputs, none with index 5."
    )


def test_a_picture_is_named_even_if_the_next_fails(folder, capsys):
    (folder / "made").mkdir()
    (folder / "made" / "file").write_bytes(b"")
    write(COPY | {"3": node("SaveImage", images=["1", 0], filename_prefix="file/b")})
    assert main(["run", "graph.json", "--output", "made"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("made/out_00001_.png  (")
    assert (
        "error: Node 3 (SaveImage): input 'filename_prefix': Cannot save made/file/b: Not a directory; "
        in err
    )


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ('{"1": x}', "graph.json is not valid JSON: Expecting value at line 1, column 7."),
        ("[" * 100_000, "graph.json is nested too deeply to be a graph."),
        ("[]", "graph.json holds a list, but a graph is an object of nodes by id."),
        ("{}", "graph.json holds no nodes."),
        (
            '{"nodes": [{"id": 1, "type": "VAELoader"}], "links": []}',
            "graph.json is a workflow of the canvas with a node 'VAELoader' (id 1), which is not known here; "
            "run with --server, on a ComfyUI that has it, or choose File > Export (API) there.",
        ),
        ('{"1": 5}', "graph.json: node 1 is a number, but an object was expected."),
        ('{"1": {"class_type": "A"}}', 'graph.json: node 1 has no "inputs" object (it may be empty).'),
        (
            json.dumps({"1": node("CascadePriorSampel")}),
            "Node 1: there is no node 'CascadePriorSampel'; did you mean CascadePriorSampler? "
            "Else run with --server, on a ComfyUI that has it.",
        ),
        (
            json.dumps({"1": COPY["1"]}),
            "The graph has no output node such as SaveImage, so there is nothing to make.",
        ),
        (
            json.dumps({"2": node("SaveImage", images=["2", 0])}),
            "Node 2 (SaveImage): input 'images' is connected to ['2', 0], "
            "but node 2 (SaveImage) has 0 outputs, none with index 0.\n"
            "error: Node 2 (SaveImage): the required input 'filename_prefix' is missing; "
            "give it a value or connect it.",
        ),
    ],
)  # fmt: skip
def test_bad_graphs(folder, capsys, graph, message):
    (folder / "graph.json").write_text(graph)
    assert failing("run", "graph.json", capsys=capsys) == f"error: {message}\n"
    assert not (folder / "output").exists()


def test_a_number_of_more_digits_than_python_reads(folder, capsys):
    (folder / "graph.json").write_text(f'{{"1": {"1" * 5000}}}')
    error_text = failing("run", "graph.json", capsys=capsys)
    assert error_text == "error: graph.json holds a number of too many digits to be read.\n"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "Cannot read the graph gone.json: No such file or directory."),
        (lambda path: path.mkdir(), "Cannot read the graph gone.json: it is a folder."),
        (
            lambda path: path.write_bytes(b"PNG\xff\xfe"),
            "gone.json is not a text file; a graph in API format is JSON.",
        ),
        (
            lambda path: path.write_bytes(b"\x89PNG\xff\xfe"),
            "gone.json is not a picture; PNG, JPEG or WebP was expected.",
        ),
    ],
)
def test_unreadable_graphs(folder, capsys, make, message):
    make(folder / "gone.json")
    assert failing("run", "gone.json", capsys=capsys) == f"error: {message}\n"


def test_a_traceback_only_when_asked(folder, capsys):
    (folder / "in.png").write_bytes((folder / "in.png").read_bytes()[:-30])
    message = "error: Node 1 (LoadImage): The picture in.png cannot be read: image file is truncated.\n"
    assert failing("run", "graph.json", capsys=capsys) == message
    error_text = failing("run", "graph.json", "--traceback", capsys=capsys)
    assert "Traceback (most recent call last)" in error_text
    assert "PictureError" in error_text
    assert error_text.endswith(message)


def test_nodes_are_listed(capsys):
    assert main(["nodes", "LoadImageMask", "CascadePriorSampler"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("LoadImageMask  (Load Image (as Mask), mask)\n")
    lines = [line.strip() for line in out.splitlines()]
    assert "in   channel  COMBO, one of alpha, red, green, blue" in lines
    assert "in   steps        INT, default 20, 1 to 10000" in lines
    assert "out  0: MASK" in lines
    assert main(["nodes"]) == 0
    assert capsys.readouterr().out.count("\n\n") >= 10


def test_nodes_as_json(capsys):
    assert main(["nodes", "SaveImage", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["SaveImage"]["input"]["required"]["filename_prefix"][0] == "STRING"
    assert info["SaveImage"]["output_node"] is True


def test_an_unknown_node_is_not_listed(capsys):
    assert failing("nodes", "SaveImages", capsys=capsys) == (
        "error: There is no node 'SaveImages'; did you mean SaveImage?\n"
    )


def test_help_loads_nothing_heavy():
    program = (
        "import sys; from cascade_nodes.headless.cli import main\n"
        "try: main(['run', '--help'])\n"
        "finally: sys.exit(' '.join({'torch', 'numpy', 'PIL', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("usage: cascade run ")
    assert done.stderr.strip() == ""


def test_a_full_disk(folder):
    """The system refuses files beyond 4 kB, and the picture has 12 kB."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    with start("run", "graph.json", prepare=limit, cwd=folder) as process:
        out, err = process.communicate()
    assert process.returncode == 1
    assert out == ""
    assert err.splitlines()[-1] == (
        "error: Node 2 (SaveImage): Cannot save output/out_00001_.png: File too large; "
        "free some space or save elsewhere (--output)."
    )
    assert list((folder / "output").iterdir()) == []


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_cascade(folder)
    return folder


def text_to_image(steps):
    sampling = {"seed": 1, "cfg": 2.0, "cfg_rescale": 0.7, "shift": 1.0, "sampler": "ddpm", "denoise": 1.0}
    prompts = {"positive": ["4", 0], "negative": ["4", 1]}
    latents = node("CascadeEmptyLatent", width=64, height=64, batch_size=1, compression=42.67)
    prior = node("CascadePriorSampler", model=["1", 0], latent=["5", 0], steps=steps, **prompts, **sampling)
    decoder = node(
        "CascadeDecoderSampler",
        model=["2", 0],
        stage_c=["6", 0],
        latent=["5", 1],
        steps=2,
        **prompts,
        **sampling,
    )
    return {
        "1": node("StageCLoader", file="tiny_stage_c.safetensors", dtype="auto"),
        "2": node("StageBLoader", file="tiny_stage_b.safetensors", dtype="auto"),
        "3": node("CascadeTextEncoderLoader", file="tiny_text_encoder"),
        "4": node("CascadeTextEncode", clip=["3", 0], positive="a red star", negative=""),
        "5": latents,
        "6": prior,
        "7": decoder,
        "8": node("StageAVAE", file="tiny_stage_a.safetensors"),
        "9": node("CascadeDecode", vae=["8", 0], samples=["7", 0], tile_size=0),
        "10": node("SaveImage", images=["9", 0], filename_prefix="star"),
    }


def test_a_prompt_becomes_a_picture(folder, models, monkeypatch, capsys):
    monkeypatch.setenv("CASCADE_MODELS", str(models))
    write(text_to_image(3))
    assert main(["run", "graph.json", "--set", "CascadeTextEncode.positive=a blue circle"]) == 0
    out, err = capsys.readouterr()
    path = out.split("  ")[0]
    with Image.open(path) as picture:
        assert picture.size == (64, 64)
        assert isinstance(picture, PngImageFile)
        assert json.loads(str(picture.text["prompt"]))["4"]["inputs"]["positive"] == "a blue circle"
    (line,) = (line for line in err.splitlines() if "CascadePriorSampler" in line)
    assert " 3/3  " in line


def test_a_cycle_runs_nothing(folder, models, monkeypatch, capsys):
    monkeypatch.setenv("CASCADE_MODELS", str(models))
    write(text_to_image(3))
    error_text = failing("run", "graph.json", "--set", '6.latent=["7", 0]', capsys=capsys)
    assert error_text == (
        "error: The graph runs in a circle, 7 (CascadeDecoderSampler) -> 6 (CascadePriorSampler) -> "
        "7 (CascadeDecoderSampler); take out one of these connections.\n"
    )


def test_ctrl_c_while_sampling(folder, models):
    write(text_to_image(10_000))
    environment = {**os.environ, "CASCADE_MODELS": str(models)}
    with start("run", "graph.json", cwd=folder, env=environment) as process:
        for line in errors_of(process):
            if "CascadeEmptyLatent" in line:  # the last node before the sampler
                break
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert errors_of(process).read() == "Stopped.\n"
    assert process.returncode == 130
    assert not (folder / "output").exists()


def test_an_amount_of_memory_that_is_none(tmp_path, capsys):
    assert main(["run", str(tmp_path / "graph.json"), "--memory", "six"]) == 1
    assert capsys.readouterr().err == (
        "error: 'six' is not an amount of memory; write one such as 6GB, 5.5GiB or 800MB.\n"
    )


def test_names_behind_an_option(capsys):
    assert main(["nodes", "SaveImage", "--json", "KSampler"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == {"SaveImage", "KSampler"}
    assert main(["fetch", "stage_a", "--to", "x", "nothing"]) == 1
    assert "no published file or workflow 'nothing'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["nodes", "SaveImage", "--foo"])
    assert "usage: cascade nodes" in capsys.readouterr().err
