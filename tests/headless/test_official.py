"""The nodes, samplers and schedulers of ComfyUI's own six examples, and the refusal of other graphs' nodes.

tests/comfyui/test_official.py holds what they compute to ComfyUI.
"""

import pytest

from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.headless import run_graph
from cascade_nodes.headless.builtin import BUILTIN_NODES
from cascade_nodes.headless.builtin.sampling import SAMPLERS, SCHEDULERS
from cascade_nodes.headless.registry import available_nodes, describe
from cascade_nodes.headless.sources import read_source
from cascade_nodes.nodes.hosts import schema as io
from cascade_nodes.nodes.hosts.roles import DEMO_FOLDER, PACK
from cascade_nodes.tests.headless.pictured import NAMES, official, save_picture
from cascade_nodes.tests.headless.record_comfyui import node

OF_THEIR_KIND = {"LoadImageMask", "VAEEncode", "ControlNetApply", "StableCascade_SuperResolutionControlnet"}


def entries():
    return [entry for name in NAMES for entry in official(name)["prompt"].values()]


def known(class_type):
    nodes = available_nodes()
    return describe(nodes[class_type]).inputs if class_type in nodes else None


def test_they_are_what_stands_in_the_examples_and_no_more():
    ids = {cls.GET_SCHEMA().node_id for cls in BUILTIN_NODES}
    assert ids - OF_THEIR_KIND == {entry["class_type"] for entry in entries()}
    samplers = [entry["inputs"] for entry in entries() if entry["class_type"] == "KSampler"]
    assert {inputs["sampler_name"] for inputs in samplers} == set(SAMPLERS)
    assert {inputs["scheduler"] for inputs in samplers} == set(SCHEDULERS)


def test_the_page_lists_them():
    page = (PACK / "docs" / "command_line.md").read_text(encoding="utf-8")
    for cls in BUILTIN_NODES:
        assert f"`{cls.GET_SCHEMA().node_id}`" in page
    assert all(f"`{name}`" in page for name in (*SAMPLERS, *SCHEDULERS))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "inpaint_controlnet"])
def test_prompts_are_what_their_workflows_say(name, tmp_path):
    texts = official(name)
    graph = read_source(save_picture(tmp_path / "a.png", workflow=texts["workflow"]), known).graph
    assert graph.keys() == texts["prompt"].keys()
    for node_id, entry in texts["prompt"].items():
        wanted = {key: value for key, value in entry["inputs"].items() if key != "upload"}
        assert graph[node_id]["class_type"] == entry["class_type"]
        assert graph[node_id]["inputs"].items() >= wanted.items()


def test_a_group_node_is_refused_and_its_prompt_runs(tmp_path):
    texts = official("inpaint_controlnet")
    path = save_picture(tmp_path / "a.png", workflow=texts["workflow"])
    with pytest.raises(CascadeError, match=r"'StableCascadeInpaintCnet' \(id 68\).*Export \(API\)"):
        read_source(path, known)
    save_picture(path, **texts)
    assert read_source(path, known).graph == texts["prompt"]


def sampled(**changed):
    """A graph of KSampler over the demo's Stage C."""
    inputs = {
        "model": ["1", 0], "seed": 5, "steps": 2, "cfg": 2.0, "sampler_name": "euler_ancestral", "scheduler": "simple",
        "positive": ["3", 0], "negative": ["3", 1], "latent_image": ["4", 0], "denoise": 1.0, **changed,
    }  # fmt: skip
    return {
        "1": node("StageCLoader", file="demo_stage_c.safetensors", dtype="auto"),
        "2": node("CascadeTextEncoderLoader", file="demo_text_encoder"),
        "3": node("CascadeTextEncode", clip=["2", 0], positive="a red star", negative=""),
        "4": node("StableCascade_EmptyLatentImage", width=256, height=256, compression=42, batch_size=1),
        "5": node("KSampler", **inputs),
        "6": node(
            "CascadeCompressorLoader",
            file="demo_compressor.safetensors",
            previewer="demo_previewer.safetensors",
        ),
        "7": node("VAEDecode", samples=["5", 0], vae=["6", 0]),
        "8": node("SaveImage", images=["7", 0], filename_prefix="a"),
    }


def refusal(graph):
    with pytest.raises(CascadeError) as caught:
        run_graph(graph)
    return str(caught.value)


@pytest.mark.parametrize(
    ("graph", "sentence"),
    [
        (
            sampled(sampler_name="dpmpp_2m"),
            "Node 5 (KSampler): inputs 'sampler_name', 'scheduler': sampler_name is 'dpmpp_2m', but only "
            "euler_ancestral runs here; run with --server, on a ComfyUI.",
        ),
        (
            sampled(scheduler="karras"),
            "Node 5 (KSampler): inputs 'sampler_name', 'scheduler': scheduler is 'karras', but only simple runs here; "
            "run with --server, on a ComfyUI.",
        ),
        (
            {"1": node("VAELoader")},
            "Node 1: there is no node 'VAELoader'; run with --server, on a ComfyUI that has it, or see `cascade "
            "nodes`.",
        ),
        (
            {"1": node("EmptyImage", width=8, height=8, batch_size=1, color=0),
             "2": node("ImageScale", image=["1", 0], upscale_method="lanczos", width=4, height=4, crop="center"),
             "3": node("PreviewImage", images=["2", 0])},
            "Node 2 (ImageScale): inputs 'upscale_method', 'crop': upscale_method is 'lanczos', but only "
            "nearest-exact, bilinear, area and bicubic run here; run with --server, on a ComfyUI.",
        ),
        (
            {"1": node("CheckpointLoaderSimple", ckpt_name=str(DEMO_FOLDER / "demo_stage_a.safetensors")),
             "2": node("EmptyImage", width=8, height=8, batch_size=1, color=0),
             "3": node("VAEEncode", pixels=["2", 0], vae=["1", 2]),
             "4": node("VAEDecode", samples=["3", 0], vae=["1", 2]),
             "5": node("PreviewImage", images=["4", 0])},
            "holds neither Stage C nor Stage B of Stable Cascade; run with --server, on a ComfyUI.",
        ),
    ],
    ids=["sampler", "scheduler", "node", "method", "checkpoint"],
)  # fmt: skip
def test_anything_else_is_refused_before_the_work(graph, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sentence in refusal(graph)
    assert not (tmp_path / "output").exists()


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("empty")
def test_our_loaders_and_comfyuis_sampler():
    pictures = [
        run_graph(sampled(**changed)).pictures[0].path.read_bytes() for changed in ({}, {}, {"seed": 6})
    ]
    assert pictures[0] == pictures[1] != pictures[2]
    assert run_graph(sampled(denoise=0.0)).pictures  # the latent as it is


class Sink(io.ComfyNode):
    """Takes anything."""

    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="Sink", inputs=[io.Custom("*").Input("x")], is_output_node=True)

    @classmethod
    def execute(cls, x):
        return io.NodeOutput()


EMPTY = {"1": node("EmptyImage", width=40, height=8, batch_size=1, color=255)}
SOCKETS = {"2": node("CheckpointLoaderSimple", ckpt_name=str(DEMO_FOLDER / "demo_stage_c.safetensors"))}


@pytest.mark.usefixtures("empty")
@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        (
            {"3": node("CLIPTextEncode", clip=["2", 1], text="a")},
            "The checkpoint holds no text encoder",
        ),
        (
            {"3": node("VAEEncode", pixels=["1", 0], vae=["2", 2])},
            "is nothing, but Stage A is expected",
        ),
        (
            {"3": node("StableCascade_StageC_VAEEncode", image=["1", 0], vae=["6", 0], compression=42),
             "6": sampled()["6"]},
            "The picture is 40 × 8 pixels, but a position of Stage C covers 42",
        ),
        (
            {"3": node("VAEEncode", pixels=["1", 0], vae=["6", 0]), "6": sampled()["6"]},
            "The picture has a side under 32 pixels",
        ),
        (
            {"3": node("Canny", image=["1", 0], low_threshold=0.5, high_threshold=0.2)},
            "low_threshold is 0.5 and high_threshold 0.2; give the smaller one as low",
        ),
        (
            {"3": node("EmptyImage", width=16384, height=16384, batch_size=4096, color=0)},
            "nor all together",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(nodes, words):
    graph = {**EMPTY, **SOCKETS, **nodes, "9": node("Sink", x=["3", 0])}
    with pytest.raises(CascadeError) as caught:
        run_graph(graph, nodes={**available_nodes(), "Sink": Sink})
    assert words in str(caught.value)
