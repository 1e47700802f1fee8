"""What a trained file says of itself: names that other programs show, nothing private unasked, the same bytes."""

import json
from pathlib import Path

import pytest

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.adapters.about import frequent_tags, training_facts
from cascade_nodes.cascade_core.checkpoints import read_safetensors
from cascade_nodes.cascade_core.training.data.access import Access
from cascade_nodes.cascade_core.training.data.sources import find_all
from cascade_nodes.cascade_core.training.file_metadata import file_metadata
from cascade_nodes.cascade_core.training.run import train
from cascade_nodes.cascade_core.training.settings import DataSettings, OutputSettings, Settings
from cascade_nodes.cascade_core.training.typed_yaml import build
from cascade_nodes.tests.core.training_runs import settings_of, write_world
from cascade_nodes.tests.core.training_sets import write_set

ABOUT = {"title": "My style", "author": "A. Person", "trigger_phrase": "[blob]", "license": "CC0"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def written(world, run, **sections):
    sections["train"] = {"steps": 1, **sections.get("train", {})}
    settings = settings_of(world, sections.pop("task", "lora"), run, **sections)
    train(settings)
    return Path(settings.output.file)


def test_a_lora_says_what_it_is(world, tmp_path):
    lora = {"rank": 4, "alpha": 2.0, "algorithm": "loha"}
    metadata = read_safetensors(written(world, tmp_path, lora=lora, output={"about": ABOUT}))[1]
    assert metadata["modelspec.architecture"] == "stable-cascade-v1-stage-c/lora"
    assert metadata["modelspec.resolution"] == "64x64"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2.0")
    assert json.loads(metadata["ss_network_args"])["algo"] == "loha"
    assert (metadata["ss_steps"], metadata["trained_steps"], metadata["ss_num_train_images"]) == (
        "1",
        "1",
        "10",
    )
    facts = training_facts(metadata)
    assert facts["title"] == "My style"
    assert facts["trigger words"] == "[blob]"
    assert facts["licence"] == "CC0"
    assert facts["trained on"] == "tiny_stage_c.safetensors"


@pytest.mark.parametrize(
    ("task", "ending"), [("controlnet", "/controlnet"), ("finetune", ""), ("tokens", "/textual-inversion")]
)
def test_every_task_says_what_it_is(world, tmp_path, task, ending):
    metadata = read_safetensors(written(world, tmp_path, task=task))[1]
    assert metadata["modelspec.architecture"] == f"stable-cascade-v1-stage-c{ending}"
    assert "ss_network_dim" not in metadata


def test_captions_and_folders_are_told_on_request_alone(world, tmp_path):
    path = written(world, tmp_path)
    text = path.read_bytes()[:20_000].decode("utf-8", "replace")
    assert "circle" not in text
    assert "pictures" not in text
    assert str(world) not in text
    metadata = read_safetensors(written(world, tmp_path, output={"captions_in_file": True}))[1]
    assert json.loads(metadata["ss_dataset_dirs"]) == {"pictures": {"img_count": 10, "n_repeats": 1}}
    assert "a red star" in frequent_tags(metadata["ss_tag_frequency"])


def test_repeats_are_those_of_each_set(tmp_path):
    """A set's times those of all, as kohya's folders state them; a picture in two sizes is one picture."""
    art, reg = (write_set(tmp_path / name, [(64, 64)] * count) for name, count in (("art", 1), ("reg", 2)))
    sets = [{"folder": str(art), "repeat": 4}, {"folder": str(reg)}]
    data = build(DataSettings, {"size": 64, "more_sizes": [128], "repeat": 2, "sets": sets})
    output = OutputSettings("a.safetensors", captions_in_file=True)
    pictures, _ = find_all(data, Access(lambda: False))
    folders = json.loads(file_metadata(Settings("lora", data, output), 1, pictures)["ss_dataset_dirs"])
    assert folders["art"] == {"img_count": 1, "n_repeats": 8}
    assert folders["reg"] == folders["more"] == {"img_count": 1, "n_repeats": 2}


def test_the_same_run_writes_the_same_bytes(world, tmp_path):
    files = [
        written(world, tmp_path / run, output={"about": ABOUT, "captions_in_file": True}) for run in "ab"
    ]
    first, second = (file.read_bytes() for file in files)
    assert first == second
    header = json.loads(first[8 : 8 + int.from_bytes(first[:8], "little")])
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])


@pytest.mark.parametrize(
    ("about", "sentence"),
    [
        ({"titel": "x"}, "output.about holds 'titel'; did you mean title?"),
        ({"title": 3}, "output.about.title is 3; a text of at most 4,096 characters is expected."),
        ({"title": "x" * 5000}, "a text of at most 4,096 characters is expected."),
    ],
)
def test_what_a_file_cannot_say(world, tmp_path, about, sentence):
    with pytest.raises(CascadeError) as error:
        settings_of(world, "lora", tmp_path, output={"about": about})
    assert sentence in str(error.value)
