"""Pictures while training: of which prompts, by which networks; and what a run says at its beginning and its end."""

import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.training.prompts import read_prompts, sample_prompts
from cascade_nodes.cascade_core.training.run import train
from cascade_nodes.cascade_core.training.samples import grid
from cascade_nodes.cascade_core.training.settings import SamplePrompt, resolve
from cascade_nodes.cascade_core.training.telling import about
from cascade_nodes.tests.core.training_runs import settings_of, write_world
from cascade_nodes.tests.nodes.tiny import FOLDERS

EVERY = {"sample_every": 4, "sample_steps": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def stages(world: Path) -> dict[str, str]:
    return {
        kind: str(world / "models" / FOLDERS[kind] / f"tiny_{kind}.safetensors")
        for kind in ("stage_b", "stage_a")
    }


def samples_of(run: Path) -> dict[str, tuple[int, int]]:
    return {path.name: Image.open(path).size for path in sorted((run / "samples").iterdir())}


@pytest.mark.parametrize("name", ["lora", "lora with tokens", "finetune"])
def test_pictures_of_their_own_sizes_by_stage_b_and_a_from_step_0_on(world, tmp_path, name):
    prompts = [
        "a star",
        {"prompt": "a star", "size": [128, 64], "steps": 1, "negative": "a circle", "seed": 5},
    ]
    settings = settings_of(world, name, tmp_path, output={**EVERY, "prompts": prompts})
    settings = settings_of(
        world,
        name,
        tmp_path,
        output={**EVERY, "prompts": prompts},
        models={**models_of(settings), **stages(world)},
    )
    train(settings)
    # two columns as wide as the wider one, and a gap
    assert samples_of(tmp_path) == dict.fromkeys(
        ("000000.png", "000004.png", "000008.png"), (2 * 128 + 4, 64)
    )
    pictures = [Image.open(tmp_path / "samples" / f"{step:06}.png").tobytes() for step in (0, 8)]
    assert pictures[0] != pictures[1]


def models_of(settings) -> dict[str, str]:
    return {key: value for key, value in asdict(settings.models).items() if value is not None}


def test_by_the_previewer_where_that_is_named(world, tmp_path):
    train(settings_of(world, "lora", tmp_path, output={**EVERY, "prompts": ["a star"]}))
    assert set(samples_of(tmp_path).values()) == {(16, 16)}  # eight pixels for each of two positions


def test_a_controlnets_pictures_have_the_size_of_their_hints(world, tmp_path):
    settings = settings_of(world, "controlnet", tmp_path, output={**EVERY, "prompts": ["a star", "a circle"]})
    train(settings)
    assert list(samples_of(tmp_path)) == ["000000.png", "000004.png", "000008.png"]
    with pytest.raises(CascadeError, match="a ControlNet have the size of its hints"):
        settings_of(world, "controlnet", tmp_path, output={**EVERY, "prompts": [{"prompt": "x", "size": 64}]})


def test_samples_change_nothing_of_what_is_trained(world, tmp_path):
    for run, output in {"with": {**EVERY, "prompts": ["a star"]}, "without": {}}.items():
        settings = settings_of(world, "finetune", tmp_path / run, output=output)
        train(settings)
    with_samples, without = ((tmp_path / run / "out.safetensors").read_bytes() for run in ("with", "without"))
    assert with_samples == without


def test_the_published_networks_are_taken_where_none_is_named(world, tmp_path):
    given = settings_of(world, "lora", tmp_path, output={**EVERY, "prompts": ["x"]}, models={})
    bare = {key: value for key, value in models_of(given).items() if key != "previewer"}
    settings = settings_of(world, "lora", tmp_path, output={**EVERY, "prompts": ["x"]}, models=bare)
    settings = _without_previewer(settings)
    there: set[str] = set()

    def find(role: str, name: str) -> Path:
        if role in ("stage_b", "stage_a", "previewer") and name not in there:
            raise CascadeError("not here")
        return Path("/models") / name

    with pytest.raises(
        CascadeError, match="none is named or found; name them, run `cascade fetch previewer`"
    ):
        resolve(settings, tmp_path, find)
    there = {"previewer.safetensors", "stage_b_lite_bf16.safetensors"}
    assert resolve(settings, tmp_path, find).models.previewer == "/models/previewer.safetensors"
    there |= {"stage_a.safetensors", "stage_b.safetensors"}
    models = resolve(settings, tmp_path, find).models
    assert (models.stage_b, models.stage_a) == ("/models/stage_b.safetensors", "/models/stage_a.safetensors")
    assert models.previewer is None


def _without_previewer(settings):
    return replace(settings, models=replace(settings.models, previewer=None))


def test_a_stage_b_of_another_text_encoder_is_refused_before_anything_is_encoded(world, tmp_path):
    demo = Path(__file__).parents[2] / "demo" / "weights"
    files = {
        "stage_b": str(demo / "demo_stage_b.safetensors"),
        "stage_a": str(demo / "demo_stage_a.safetensors"),
    }
    given = models_of(settings_of(world, "lora", tmp_path))
    settings = settings_of(world, "lora", tmp_path, models={**given, **files})
    with pytest.raises(
        CascadeError, match=r"which takes vectors of .*, but the text encoder gives .*; name the"
    ):
        train(settings, caching=lambda *counts: pytest.fail("encoded"))


def test_a_prompts_file_is_drawn_while_it_trains(world, tmp_path):
    """As the same prompts in the settings, after theirs."""
    path = tmp_path / "prompts.txt"
    path.write_text("a star --n a circle --w 128 --h 64 --d 5 --s 1\n")
    prompt = {"prompt": "a star", "negative": "a circle", "size": [128, 64], "seed": 5, "steps": 1}
    pictures = []
    for name, more in (
        ("file", {"prompts": ["a ring"], "prompts_file": str(path)}),
        ("settings", {"prompts": ["a ring", prompt]}),
        ("neither", {"prompts": ["a ring", {**prompt, "seed": 6}]}),
    ):
        train(settings_of(world, "lora", tmp_path / name, output={**EVERY, **more}, train={"steps": 4}))
        assert len(samples_of(tmp_path / name)) == 2
        pictures.append((tmp_path / name / "samples" / "000004.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_prompts_of_a_text_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(
        "# samples\n\na red star\n"
        "a blue ring, thin -- and large --n blurry, low quality --w 512 --h 768 --d 7 --s 12 --l 3.5\n"
        "a heart --w 256\n"
    )
    assert read_prompts(path) == [
        SamplePrompt("a red star"),
        SamplePrompt("a blue ring, thin -- and large", "blurry, low quality", 7, (512, 768), 12, 3.5),
        SamplePrompt("a heart", size=(256, 256)),
    ]


@pytest.mark.parametrize("name", ["prompts.yaml", "prompts.json"])
def test_prompts_of_a_file_as_in_the_settings(tmp_path, name):
    path = tmp_path / name
    path.write_text('{"prompts": ["a star", {"prompt": "a ring", "seed": 3, "size": [64, 128]}]}')
    assert read_prompts(path) == ["a star", SamplePrompt("a ring", seed=3, size=(64, 128))]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.txt", "a star --q 3", r"--q of 'a star --q 3' is not one of --n, --w, --h, --d, --s, --l"),
        ("a.txt", "a star --s many", r"numbers are expected in 'a star --s many'"),
        ("a.txt", "a star --w 100", r"width and height in multiples of 8 are expected"),
        ("a.txt", "a star --s 0", r"output.prompts.steps is 0; it must be at least 1"),
        ("a.yaml", "prompts: [{promt: x}]", r"prompts\[0\]: 'promt' is not a setting; did you mean prompt"),
        ("a.yaml", "- x", r"settings are names with values"),
        ("none.txt", None, r"cannot be read"),
    ],
)
def test_what_is_wrong_in_a_prompts_file_is_said_before_anything_is_loaded(
    world, tmp_path, name, text, sentence
):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    settings = settings_of(world, "lora", tmp_path / "run", output={**EVERY, "prompts_file": str(path)})
    with pytest.raises(CascadeError, match=sentence):
        train(settings)
    assert not (tmp_path / "run").exists()


def test_what_a_prompt_leaves_open_is_as_for_all(world, tmp_path):
    prompts = ["a", {"prompt": "b", "seed": 9, "cfg": 1, "size": 128}]
    settings = settings_of(
        world, "lora", tmp_path, output={**EVERY, "prompts": prompts}, train={"seed": 4}, data={"size": 68}
    )
    assert sample_prompts(settings) == [
        SamplePrompt("a", "", 4, (64, 64), 2, 4.0),
        SamplePrompt("b", "", 9, (128, 128), 2, 1.0),
    ]


def test_a_page_of_pictures_of_different_sizes():
    page = grid([torch.zeros(3, 8, 16), torch.zeros(3, 16, 8), torch.zeros(3, 8, 8)])
    assert page.shape == (3, 36, 36)
    assert (page == 0).sum().item() == 3 * (2 * 128 + 64)


def test_a_run_says_what_it_does_and_what_came_of_it(world, tmp_path):
    told: list[str] = []
    settings = settings_of(world, "lora", tmp_path, train={"accumulate": 2, "batch_size": 4})
    train(settings, told.append)
    began = next(sentence for sentence in told if sentence.startswith("Training on"))
    # Buckets of six and four pictures: an epoch is two batches of three and one of four, and so 1.5 steps.
    assert began.startswith("Training on the processor in fp32, 1 process: ")
    assert (
        "A step takes 8 pictures (4 × 2 accumulated × 1 process), 6.67 on average, as buckets hold fewer; an epoch is "
        "1.5 steps, and the run has 8 steps, 5.33 epochs. "
    ) in began
    assert began.endswith(f"samples go to {tmp_path}, the result to {tmp_path / 'out.safetensors'}.")
    assert told[-1].startswith(f"Wrote {tmp_path / 'out.safetensors'}: a LoRA of rank 16 of ")
    assert " layers of Stage C, as kohya writes it, in fp32 after 8 steps, averaged over steps" in told[-1]


def test_a_rounded_number_decides_the_plural():
    told = [about(number, "epoch") for number in (1.001, 1.006, 0.0625, 5.333, 1234.4)]
    assert told == ["1 epoch", "1.01 epochs", "0.0625 epochs", "5.33 epochs", "1,234 epochs"]


def test_what_there_is_one_of_is_told_as_one(world, tmp_path):
    told: list[str] = []
    settings = settings_of(
        world,
        "lora",
        tmp_path,
        lora={"targets": ["clip_txt_mapper"], "rank": 1},
        validation={"share": 0.1, "every": 1},
        train={"steps": 1, "batch_size": 20},
    )
    train(settings, told.append)
    sentences = "\n".join(told)
    assert "1 picture is held out; the error is measured on 1." in sentences
    assert "an epoch is 1 step, and the run has 1 step, 1 epoch. " in sentences
    assert "\n1 step, 0:00 this time." in sentences
    assert "a LoRA of rank 1 of 1 layer of Stage C, as kohya writes it, in fp32 after 1 step," in sentences
    assert sentences.endswith(" kB.")
    assert re.findall(r"\b1 \w+s\b(?<!process)", sentences) == []
