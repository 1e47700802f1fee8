"""Bad graphs, values, prompts and folders through the command itself, and what is unusual but allowed.

Graphs are refused in more detail in tests/headless, sockets in tests/nodes.
"""

import json
import os
import shutil

import pytest
from PIL import Image

from cascade_nodes.headless.cli import main
from cascade_nodes.tests.bad_input.graphs import GRAPH, TINY_FILES, command
from cascade_nodes.tests.headless.command import start
from cascade_nodes.tests.headless.record_comfyui import node
from cascade_nodes.tests.obstacles import permissions_respected


@pytest.mark.parametrize("graph", [GRAPH, "picture.json", "compress.json"])
def test_the_graphs_are_good_where_nothing_is_bad(graph, working_folder, capsys):
    assert main(command(graph)) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert (working_folder / line.split("  ")[0]).is_file()


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
        ("7.steps=many", "Node 7 (CascadePriorSampler): input 'steps' is 'many', but it takes a whole number (INT)."),
        ("7.cfg=NaN", "Node 7 (CascadePriorSampler): input 'cfg' is nan, but it takes a number (FLOAT)."),
        ("6.width=wide", "Node 6 (CascadeEmptyLatent): input 'width' is 'wide', but it takes a whole number (INT)."),
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
            "Node 7: there is no node 'CascadeSampler'; did you mean CascadePriorSampler? Else "
            "run with --server, on a ComfyUI that has it.",
        ),
        (
            lambda graph: graph["7"].update(class_type="VAELoader"),
            "Node 7: there is no node 'VAELoader'; run with --server, on a ComfyUI that has it, or see "
            "`cascade nodes`.",
        ),
    ],
)
def test_graphs_that_are_refused_before_anything_runs(change, sentence, working_folder, capsys):
    graph = json.loads(GRAPH.read_text(encoding="utf-8"))
    change(graph)
    (working_folder / "graph.json").write_text(json.dumps(graph))
    assert main(["run", "graph.json"]) == 1
    assert capsys.readouterr() == ("", f"error: {sentence}\n")
    assert not (working_folder / "output").exists()


def test_a_picture_too_small_for_stage_b(refused):
    assert refused("6.width=8") == (
        "Node 8 (CascadeDecoderSampler): The picture is 8 × 64 pixels, but tiny_stage_b.safetensors (Stage "
        "B) makes none with a side under 16; choose a larger width and height."
    )


@pytest.mark.parametrize(
    "prompt", ["", " ".join(f"star{number}" for number in range(10_000))], ids=["empty", "10,000 words"]
)
def test_prompts_that_are_allowed(prompt, working_folder, capsys):
    assert main(command(GRAPH, f"5.positive={prompt}")) == 0
    (line,) = capsys.readouterr().out.splitlines()
    with Image.open(line.split("  ")[0]) as picture:
        assert picture.size == (64, 64)


def test_a_prompt_that_is_no_text(refused):
    """A terminal that does not write UTF-8 gives such prompts."""
    assert refused("5.negative=caf\udce9") == (
        "Node 5 (CascadeTextEncode): negative holds '\\udce9', which is not a character; write the prompt in "
        "UTF-8."
    )


def test_weights_in_a_prompt_too_large_for_floats(refused):
    assert refused("5.positive=(red:3e38) (star:-3e38)") == (
        "Node 5 (CascadeTextEncode): What the text encoder gives for positive holds NaN or infinity, though "
        "none of the weights does; lower the weights in the prompt."
    )


def test_a_folder_that_must_not_be_written_to_is_found_before_the_work(working_folder, refused):
    (working_folder / "locked").mkdir(mode=0o555)
    (working_folder / "file").write_bytes(b"")
    with permissions_respected():
        for folder, reason in (
            ("locked", "Permission denied"),
            ("locked/new", "Permission denied"),
            ("file", "Not a directory"),
        ):
            assert refused(output=folder, begun=False) == (
                f"Cannot save {folder}: {reason}; choose a folder that can be written to (--output)."
            )


def test_files_and_folders_that_must_not_be_read(working_folder, models, refused, monkeypatch):
    shutil.copytree(models / "text_encoders" / "tiny_text_encoder", working_folder / "encoder")
    shutil.copy(models / TINY_FILES["Stage C"], working_folder / "c.safetensors")
    (working_folder / "c.safetensors").chmod(0)
    (working_folder / "closed").mkdir(mode=0)
    (working_folder / "encoder" / "merges.txt").chmod(0)
    monkeypatch.setenv("CASCADE_MODELS", f"{working_folder / 'closed'}{os.pathsep}{models}")
    with permissions_respected():
        assert refused("1.file=c.safetensors") == (
            "Node 1 (StageCLoader): c.safetensors cannot be read (Permission denied); make it readable or "
            "choose another."
        )
        assert "'closed/c.safetensors' was found" in refused("1.file=closed/c.safetensors", begun=False)
        assert refused("4.file=encoder") == (
            "Node 4 (CascadeTextEncoderLoader): encoder/merges.txt cannot be read (Permission denied); make it "
            "readable, or download it again."
        )
    (working_folder / "closed").chmod(0o755)


def test_as_a_program_whose_output_goes_to_a_full_disk(working_folder):
    (working_folder / "graph.json").write_text(
        json.dumps(
            {
                "1": node("LoadImage", image="in.png"),
                "2": node("SaveImage", images=["1", 0], filename_prefix="a"),
            }
        )
    )
    with (
        open("/dev/full", "wb") as full,
        start("run", "graph.json", cwd=working_folder, stdout=full) as process,
    ):
        _, err = process.communicate()
    assert process.returncode == 1
    assert err.splitlines()[2:] == ["error: the output cannot be written to (No space left on device)."]
    assert [path.name for path in (working_folder / "output").iterdir()] == ["a_00001_.png"], (
        "the picture is there"
    )
