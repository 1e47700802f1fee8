"""`cascade show`, and what pictures say of themselves in the words that viewers show."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from cascade_nodes.cascade_core.adapters import Adapter, LearnedToken, LowRank, write_adapter
from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.headless.cli import main
from cascade_nodes.headless.show import show
from cascade_nodes.headless.summary import parameters, summarise
from cascade_nodes.nodes.hosts.roles import PACK
from cascade_nodes.tests.headless.pictured import official, save_picture
from cascade_nodes.tests.headless.record_comfyui import node
from cascade_nodes.tests.web.examples import api_file, canvas_file, read


def example(name):
    return read(api_file(name))


def test_a_picture_of_comfyui(tmp_path, capsys):
    path = save_picture(tmp_path / "a.png", **official("canny_controlnet"))
    assert main(["show", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "a.png: 6 × 4",
        "prompt    evening sunset scenery blue sky nature, glass bottle with a fizzy ice cold freezing rainbow "
        "liquid in it",
        "negative  text, watermark",
        "Stage C   seed 784805947292946, 20 steps, cfg 4, euler_ancestral, simple, denoise 1  (3 KSampler)",
        "Stage B   seed 951405158245073, 10 steps, cfg 1.1, euler_ancestral, simple, denoise 1  (33 KSampler)",
        "picture   example.png",
        "file      stable_cascade_stage_b.safetensors  (42 CheckpointLoaderSimple)",
        "file      stable_cascade_stage_c.safetensors  (41 CheckpointLoaderSimple)",
        "file      stable_cascade_canny.safetensors  (47 ControlNetLoader)",
        "graph     16 nodes; --json prints it",
    ]


def test_for_programs(tmp_path, capsys):
    texts = official("text_to_image")
    path = save_picture(tmp_path / "a.webp", **texts)
    assert main(["show", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["graph"] == texts["prompt"]
    assert (facts["width"], facts["height"], facts["parameters"]) == (6, 4, None)
    assert facts["negative"] == "text, watermark"
    assert [(one["stage"], one["seed"], one["steps"]) for one in facts["samplers"]] == [
        ("Stage C", 314307448448003, 20),
        ("Stage B", 183495397600639, 10),
    ]


def test_graphs_and_workflows_are_shown_alike():
    lines = [show(path("lora")).splitlines() for path in (canvas_file, api_file)]
    assert lines[0][1:] == lines[1][1:]  # after the name of the file
    assert (
        "file      demo_lora_house.safetensors, strength_model 1, strength_clip 1  (5 CascadeLoRAApply)"
        in (lines[0])
    )
    assert "file      demo_text_encoder  (4 CascadeTextEncoderLoader)" in lines[0]


def test_words_of_another_program(tmp_path):
    path = save_picture(tmp_path / "a.png", parameters="a star\x1b[2J\nSteps: 20, Seed: 5")
    assert show(path).splitlines() == ["a.png: 6 × 4", r"a star\x1b[2J", "Steps: 20, Seed: 5"]
    with pytest.raises(CascadeError, match=r"a\.png holds no graph"):
        show(save_picture(tmp_path / "a.png"))


def test_parameters_as_viewers_read_them():
    graph = example("image_variation")
    text = parameters(summarise(graph), 256, 128, batch=2, index=1)
    assert text is not None
    *_, last = text.splitlines()
    entries = dict(entry.split(": ") for entry in last.split(", "))
    assert entries["Size"] == "256x128"
    assert entries["Model"] == "demo_stage_c"
    assert (entries["Batch size"], entries["Batch pos"]) == ("2", "1")
    sampler = next(entry for entry in graph.values() if entry["class_type"] == "CascadePriorSampler")[
        "inputs"
    ]
    assert int(entries["Seed"]) == sampler["seed"]
    assert int(entries["Steps"]) == sampler["steps"]
    assert float(entries["CFG scale"]) == sampler["cfg"]


def test_parameters_of_the_official_graphs():
    text = parameters(summarise(official("image_to_image")["prompt"], "9"), 768, 768)
    assert text == (
        "evening sunset scenery blue sky nature, glass bottle with a fizzy ice cold freezing rainbow liquid in it\n"
        "Negative prompt: text, watermark\n"
        "Steps: 20, Sampler: euler_ancestral, Schedule type: simple, CFG scale: 4, Seed: 321653652654528, "
        "Size: 768x768, Model: stable_cascade_stage_c, Denoising strength: 0.6, Stage B seed: 980291192346449, "
        "Stage B steps: 10, Stage B CFG scale: 1.1"
    )


@pytest.mark.parametrize(
    "graph",
    [
        {"1": node("A"), "2": node("B", positive=["2", 0], negative=["1", 9])},
        {"1": node("A", model=["1", 0], seed=3, positive=["1", 0])},
        {"1": node("A", seed=3, positive=["2", 0]), "2": node("B", conditioning=["2", 0])},
        {"1": {"inputs": {"seed": True, "steps": [], "file": "x"}}},
    ],
)
def test_odd_graphs_are_summarised_in_silence(graph):
    assert parameters(summarise(graph), 8, 8) is None


def test_texts_that_a_chunk_cannot_hold_are_mended():
    graph = {"1": node("A", seed=3, positive=["2", 0], model=["3", 0]),
             "2": node("B", text="a\x00\ud800é"), "3": node("C", file="x, y.safetensors")}  # fmt: skip
    assert parameters(summarise(graph), 8, 8) == 'a?é\nSeed: 3, Size: 8x8, Model: "x, y"'


def test_each_saved_picture_tells_its_own_prompt(tmp_path, monkeypatch):
    """Two pictures of one run, of other prompts and seeds."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (6, 4)).save("in.png")
    # LoadImage takes no prompt: its other inputs are passed over, but a summary reads them.
    graph = {}
    for key, prompt in (("a", "a red star"), ("b", "星 {}")):
        graph[f"{key}1"] = node("T", positive=prompt, negative="")
        graph[f"{key}2"] = node(
            "LoadImage",
            image="in.png",
            seed=len(graph),
            steps=2,
            positive=[f"{key}1", 0],
            negative=[f"{key}1", 1],
        )
        graph[f"{key}3"] = node("SaveImage", images=[f"{key}2", 0], filename_prefix=key)
        graph[f"{key}1"]["class_type"] = "LoadImage"
        graph[f"{key}1"]["inputs"]["image"] = "in.png"
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    assert main(["run", "graph.json"]) == 0
    for key, prompt, seed in (("a", "a red star", 1), ("b", "星 {}", 4)):
        with Image.open(tmp_path / "output" / f"{key}_00001_.png") as picture:
            assert isinstance(picture, PngImageFile)
            assert picture.text["parameters"] == f"{prompt}\nSteps: 2, Seed: {seed}, Size: 6x4"


def test_a_lora_in_json_as_in_text(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    changes = {
        "clip_txt_mapper": LowRank(torch.ones(2, 40), torch.ones(48, 2), 1.0),
        "clf.1": LowRank(torch.ones(3, 48, 1, 1), torch.ones(16, 3, 1, 1), 2.0),
    }
    tokens = (LearnedToken("[star]", torch.ones(1, 64)),)
    about = {"modelspec.trigger_phrase": "[star]", "modelspec.license": "MIT", "base_model": "Stage C"}
    write_adapter(
        "a.safetensors", Adapter("a", "onetrainer", changes, {}, tokens), "onetrainer", metadata=about
    )
    assert main(["show", "--json", "a.safetensors"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "file": "a.safetensors",
        "kind": "lora",
        "dialect": "onetrainer",
        "kinds": ["LoRA"],
        "stage_c_layers": 2,
        "stage_b_layers": 0,
        "text_layers": 0,
        "ranks": [2, 3],
        "alphas": [1.0, 2.0],
        "dora_layers": 0,
        "tokens": ["[star]"],
        "training": {"trigger words": "[star]", "trained on": "Stage C", "licence": "MIT"},
        "notes": [],
    }
    assert show(Path("a.safetensors")).splitlines() == [
        "a.safetensors (onetrainer): 2 layers of Stage C, rank 2 to 3, 1 learned token ([star])",
        "a.safetensors says of itself: trigger words [star]; trained on Stage C; licence MIT.",
    ]


def test_networks_in_files_and_folders(tmp_path):
    weights = PACK / "demo" / "weights"
    assert (
        show(weights / "demo_text_encoder").splitlines()[1].startswith("text encoder: 1,986,432 weights in")
    )
    for subfolder, name in (("prior", "demo_stage_c"), ("vqgan", "demo_stage_a")):
        (tmp_path / subfolder).mkdir()
        copy = tmp_path / subfolder / "diffusion_pytorch_model.safetensors"
        copy.write_bytes((weights / f"{name}.safetensors").read_bytes())
    facts = json.loads(show(tmp_path, as_json=True))
    assert [one["network"] for one in facts["networks"]] == ["stage_c", "stage_a"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.gguf", b"GGUF\x03", "is a GGUF file, a form that no program has for Stable Cascade"),
        ("a.ckpt", b"\x80\x02abcdefgh", "is a pickle"),
        ("a.safetensors", b"<html>", "is a web page in place of the file"),
        ("none.safetensors", None, "does not exist"),
        ("", None, "is a folder without networks of Stable Cascade; give a picture"),
        ("none.json", None, "No such file"),
    ],
)
def test_what_cannot_be_shown_is_named(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CascadeError, match=message):
        show(tmp_path / name)


def test_json_is_json_whatever_a_graph_holds(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(
        '{"1": {"class_type": "KSampler", "inputs": {"cfg": 1e999}, "is_changed": [NaN, -Infinity]}}'
    )
    facts = json.loads(show(path, as_json=True), parse_constant=lambda name: pytest.fail(name))
    assert facts["graph"]["1"] == {
        "class_type": "KSampler",
        "inputs": {"cfg": None},
        "is_changed": [None, None],
    }
