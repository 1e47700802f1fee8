"""What was trained, in a picture: of Stage B, of the text encoder, and of both with Stage C."""

import numpy as np
import pytest
from PIL import Image

from cascade_nodes.headless import run_graph
from cascade_nodes.headless.trial import trial_graph
from cascade_nodes.tests.core.training_runs import loop_of, settings_of, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def picture(graph, folder):
    (path,) = run_graph(graph, output_folder=folder).pictures
    with Image.open(path.path) as image:
        return np.asarray(image).astype(float)


def untrained(graph, trained, settings):
    """The same graph without the trained files."""
    files = {"1": settings.models.stage_c, "2": settings.models.stage_b, "4": settings.models.text_encoder}
    plain = {number: {**node, "inputs": dict(node["inputs"])} for number, node in graph.items()}
    for number, file in files.items():
        if plain[number]["inputs"]["file"] == str(trained):
            plain[number]["inputs"]["file"] = str(file)
    if "5" in plain:
        plain["5"]["inputs"] |= {"strength_model": 0.0, "strength_clip": 0.0}
    return plain


@pytest.mark.parametrize(
    "name",
    ["lora of stage b", "finetune of stage b", "lora of the text encoder", "finetune with text"],
)
def test_a_picture_is_another_with_what_was_trained(world, tmp_path, name):
    sections = {"output": {"prompts": ["a red star"], "sample_steps": 2}, "train": {"learning_rate": 0.02}}
    settings = settings_of(world, name, tmp_path, **sections)
    loop = loop_of(settings)
    loop.run()
    file = tmp_path / "out.safetensors"
    loop.task.write(loop.state, file, {})
    models = world / "models"
    stages = str(models / "unet/tiny_stage_b.safetensors"), str(models / "vae/tiny_stage_a.safetensors")
    graph = trial_graph(settings, file, *stages)
    plain = untrained(graph, file, settings)
    assert np.abs(picture(graph, tmp_path / "with") - picture(plain, tmp_path / "without")).max() > 1
