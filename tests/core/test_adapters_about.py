"""What a LoRA's file says of its training, bounded and in one line."""

import json

import pytest

from cascade_nodes.cascade_core.adapters import Adapter, describe_file
from cascade_nodes.cascade_core.adapters.about import training_facts

KOHYA = {
    "ss_output_name": "fernando",
    "ss_sd_model_name": "stage_c_bf16.safetensors",
    "ss_base_model_version": "stable_cascade",
    "ss_network_dim": "16",
    "ss_network_alpha": "8.0",
    "ss_tag_frequency": json.dumps(
        {"10_dog": {"dog": 3, "fernando": 20}, "5_other": {"fernando": 1, "sea ": 7}}
    ),
    "modelspec.architecture": "stable-cascade-v1-prior/lora",
    "modelspec.title": "Fernando",
    "modelspec.license": "CC-BY-4.0",
}


def test_kohyas_metadata_and_modelspec():
    assert training_facts(KOHYA) == {
        "title": "Fernando",
        "base model": "stable-cascade-v1-prior/lora",
        "trained on": "stage_c_bf16.safetensors",
        "rank": "16",
        "alpha": "8.0",
        "licence": "CC-BY-4.0",
        "frequent in its captions": "fernando, sea, dog",
    }
    stated = {**KOHYA, "modelspec.trigger_phrase": "fernando the dog"}
    assert training_facts(stated)["trigger words"] == "fernando the dog"
    assert "frequent in its captions" not in training_facts(stated)
    lines = describe_file(Adapter("a.safetensors", "kohya", metadata=stated, notes=("An assumption.",)))
    assert lines[1].startswith(
        "a.safetensors says of itself: title Fernando; trigger words fernando the dog; base"
    )
    assert lines[2] == "An assumption."


@pytest.mark.parametrize(
    "tags", ["", "[", "[]", "5", '{"a": 5}', '{"a": {"b": "c"}}', '{"a": {"": 1}}', "[" * 99_999]
)
def test_tags_that_are_none(tags):
    assert training_facts({"ss_tag_frequency": tags, "ss_network_dim": "None", "modelspec.title": " "}) == {}


def test_what_a_file_says_is_cut_and_escaped():
    hostile = "\x1b[2J\n" + "x" * 10**6
    metadata = {"modelspec.title": hostile, "ss_tag_frequency": json.dumps({"a": {hostile: 1}})}
    (line,) = describe_file(Adapter("a", "kohya", metadata=metadata))[1:]
    assert line.isprintable()
    assert len(line) < 500
