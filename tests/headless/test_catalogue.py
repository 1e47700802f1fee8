"""The table of the published files against what else speaks of them."""

import json
from pathlib import Path

import pytest

from cascade_nodes.headless.catalogue import FILES, OPENAI, STABILITY, WORKFLOWS, in_words, notice

EXAMPLES = Path(__file__).parents[2] / "example_workflows"


def test_names_of_files_and_workflows_differ_and_needs_exist():
    assert not FILES.keys() & WORKFLOWS.keys()
    for workflow in WORKFLOWS.values():
        assert workflow.needs
        for need in workflow.needs:
            assert need
            assert set(need) <= FILES.keys()


@pytest.mark.parametrize(
    ("workflow", "graph"),
    [
        ("image_variation", "image_variation"),
        ("image_to_image", "image_to_image"),
        ("edges", "controlnet_canny"),
        ("inpainting", "controlnet_inpainting"),
        ("super_resolution", "super_resolution"),
    ],
)
def test_a_workflow_needs_what_its_example_graph_loads(workflow, graph):
    files = {
        "StageCLoader": "stage_c",
        "StageBLoader": "stage_b",
        "StageAVAE": "stage_a",
        "CascadeTextEncoderLoader": "text_encoder",
        "CascadeCompressorLoader": "effnet_encoder",
        "CascadeVisionLoader": "image_encoder",
        "CascadeControlNetLoader": f"controlnet_{graph.removeprefix('controlnet_')}",
    }
    nodes = json.loads((EXAMPLES / "api" / f"{graph}.json").read_text(encoding="utf-8")).values()
    loaded = {files[node["class_type"]] for node in nodes if node["class_type"] in files}
    assert len(WORKFLOWS[workflow].needs) == len(loaded)
    for need in WORKFLOWS[workflow].needs:
        assert loaded & set(need)


def test_the_examples_offer_the_same_files():
    """ComfyUI's dialog for missing models downloads what a loader's `models` names."""
    files_by_name = {file.saved_as: file for file in FILES.values()}
    offered = [
        entry
        for path in sorted(EXAMPLES.glob("*.json"))
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]
        for entry in node.get("properties", {}).get("models", [])
    ]
    assert len(offered) == 2
    for entry in offered:
        file = files_by_name[entry["name"]]
        assert entry["url"] == f"https://huggingface.co/{file.repo}/resolve/main/{file.path}"
        assert entry["directory"] == file.folder


def test_the_notice_names_each_repository_with_its_licence():
    assert notice(["stage_a", "image_encoder", "previewer", "stage_a"]).splitlines() == [
        "stage_a, previewer (89.7 MB) of https://huggingface.co/stabilityai/stable-cascade",
        f"  licence: {STABILITY.name} ({STABILITY.terms})",
        f"  read it: {STABILITY.url}",
        "image_encoder (1.71 GB) of https://huggingface.co/openai/clip-vit-large-patch14",
        f"  licence: {OPENAI.name} ({OPENAI.terms})",
        f"  read it: {OPENAI.url}",
    ]


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1500, "1.5 kB"),
        (73_654_345, "73.7 MB"),
        (7_180_000_000, "7.18 GB"),
        (14_400_000_000, "14.4 GB"),
        (123_456_000_000, "123 GB"),
    ],
)
def test_sizes_in_words(size, words):
    assert in_words(size) == words
