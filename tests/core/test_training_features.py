"""Every setting of docs/tasks/training_features.md, trained with: other weights come out of it than without.

What they are is asserted by the tests that the page names.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cascade_nodes.cascade_core.training.presets import preset_values
from cascade_nodes.cascade_core.training.run import train
from cascade_nodes.tests.core.test_training_optimisers import OPTIMISERS
from cascade_nodes.tests.core.training_runs import loop_of, same, settings_of, write_world
from cascade_nodes.tests.core.training_sets import write_tar

Sections = dict[str, Any]  # of a settings file; `name`: of an entry of TASKS, a LoRA if it is missing


def of(section: str, **changed: Any) -> tuple[Sections, Sections]:
    return {}, {section: changed}


def sets(**changed: Any) -> tuple[Sections, Sections]:
    """Without and with something in the second of two sets."""
    return {"data": {"sets": [{"folder": "more"}]}}, {"data": {"sets": [{"folder": "more", **changed}]}}


def task(name: str, without: str = "lora") -> tuple[Sections, Sections]:
    return {"name": without}, {"name": name}


TAGS = {"caption_suffix": ".tags", "caption_variants": 4}
# By row of the page: (settings, what differs from them) of each of its keys.
FEATURES: dict[str, list[tuple[Sections, Sections]]] = {
    "several sets with repeats": [of("data", sets=[{"folder": "more"}]), sets(repeat=3)],
    "regularisation pictures with a weight": [sets(weight=0.25)],
    "masked loss": [
        of("data", masks="beside"),
        of("data", mask_folder="masks"),
        ({"data": {"masks": "beside"}}, {"data": {"unmasked_weight": 0.9}}),
        ({"data": {"masks": "beside"}}, {"data": {"unmasked_share": 1.0}}),
    ],
    "masks by transparency": [sets(masks="alpha")],
    "aspect buckets": [of("data", size=96), ({"data": {"size": 96}}, {"data": {"bucket_step": 48}})],
    "bounds of the buckets' sides": [
        ({"data": {"size": 96}}, {"data": {"min_bucket_side": 96}}),
        ({"data": {"size": 96}}, {"data": {"max_bucket_side": 96}}),
    ],
    "another size for each set": [sets(size=96)],
    "several sizes of each picture": [of("data", more_sizes=[96]), sets(more_sizes=[96])],
    "pictures are not enlarged": [
        ({"data": {"size": 96}}, {"data": {"enlarge": False}}),
        ({"data": {"size": 96}}, {"data": {"max_enlarge": 1.18}}),
    ],
    "random crops": [of("data", crops=3), ({"data": {"crops": 3}}, {"data": {"crop_zoom": 1.5}})],
    "mirrored pictures": [of("data", flip=True)],
    "one caption for all pictures, other endings of caption files": [
        ({"data": {"sets": [{"folder": "bare"}]}}, {"data": {"caption": "a red star"}}),
        of("data", caption_suffix=".tags"),
    ],
    "shuffled and kept tags, tag dropout": [
        ({"data": TAGS}, {"data": {"shuffle_tags": True}}),
        ({"data": TAGS}, {"data": {"tag_dropout": 0.5}}),
        ({"data": {**TAGS, "shuffle_tags": True}}, {"data": {"keep_tags": 2}}),
    ],
    "trigger words": [of("data", trigger="sks"), sets(trigger="sks")],
    "image prompts": [task("lora with image prompts")],
    "noise offset": [of("objective", noise_offset=0.1)],
    "multires noise": [of("objective", multires_noise=0.3)],
    "Huber": [of("objective", huber=0.1)],
    "a range of times": [of("objective", t_range=[0.2, 0.6])],
    "min-SNR weighting": [of("objective", weighting="min_snr_gamma")],
    "validation loss, the same in every run": [of("validation", share=0.3, every=1)],
    "distillation for few steps": [task("lora for few steps")],
    "LoRA": [of("lora", targets=["attention"])],
    "LoHa, LoKr": [of("lora", algorithm="loha"), of("lora", algorithm="lokr")],
    "DoRA": [of("lora", dora=True)],
    "rsLoRA": [of("lora", rslora=True)],
    "LoRA+, ranks and learning rates by pattern": [
        of("lora", up_learning_rate=16.0),
        of("lora", ranks={"attention": 4}),
        of("lora", rates={"attention": 0.1}),
    ],
    "learning rates of blocks by index": [of("lora", rates={"down_blocks.0.*": 0.5, "up_blocks.0.1.*": 2.0})],
    "dropout of values between down and up": [of("lora", dropout=0.5)],
    "dropout of ranks and of layers": [of("lora", rank_dropout=0.5), of("lora", module_dropout=0.5)],
    "going on from a LoRA of any program": [of("lora", start="first.safetensors")],
    "textual inversion, and going on with it": [
        ({"name": "tokens"}, {"tokens": [{"name": "blob", "initial": "a circle", "vectors": 2}]}),
        ({"name": "tokens"}, {"tokens": [{"name": "blob", "start": "token.safetensors", "vectors": 2}]}),
    ],
    "the text encoder, by a LoRA": [task("lora with text"), task("lora of the text encoder")],
    "the text encoder whole, alone or with Stage C": [
        task("finetune with text", "finetune"),
        task("finetune of the text encoder", "finetune"),
    ],
    "Stage B, by a LoRA": [task("lora of stage b")],
    "Stage B with the compressor's latent at any size, as published": [
        ({"name": "lora of stage b"}, {"stage_b": {"scales": [0.5]}})
    ],
    "Stage B whole": [task("finetune of stage b", "finetune")],
    "Stage C (there: their network) whole, or in part": [
        ({"name": "finetune"}, {"finetune": {"modules": ["up_blocks.*"]}}),
        ({"name": "finetune"}, {"finetune": {"depth": [0.5, 1]}}),
    ],
    "ControlNets": [task("controlnet")],
    "frozen weights in 8 or 4 bits": [of("train", base_weights="int8"), of("train", base_weights="nf4")],
    "paged 8-bit AdamW, schedule-free": [
        of("train", optimizer="paged_adamw8bit"),
        of("train", optimizer="schedulefree"),
    ],
    "AdamW, 8-bit, Adafactor, Lion, Prodigy": [
        of("train", **OPTIMISERS[name]) for name in ("adamw8bit", "adafactor", "lion", "prodigy")
    ],
    "any other optimiser by its class": [of("train", **OPTIMISERS["torch.optim.NAdam"])],
    "linear, cosine, restarts": [
        ({"train": {"schedule": "constant"}}, {"train": {"schedule": "linear"}}),
        ({"train": {"schedule": "constant"}}, {"train": {"schedule": "cosine"}}),
        of("train", restarts=1),
    ],
    "lower bound of the learning rate (floor), stable decay": [
        of("train", final_learning_rate=0.5),
        of("train", schedule="stable_decay", decay=2),
    ],
    "average of weights, and raw weights": [of("train", ema=0.0)],
    "presets by memory": [
        ({}, {name: dict(values) for name, values in preset_values("8gb", "lora")[1].items()})
    ],
}
CASES = [(row, number) for row, cases in FEATURES.items() for number in range(len(cases))]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world whose pictures have tags and masks; `more` has transparency, `bare` one caption alone."""
    world = write_world(tmp_path_factory.mktemp("world"))
    half = np.zeros((80, 80), dtype=np.uint8)
    half[:, :40] = 255
    mask = Image.fromarray(half)
    for folder in ("more", "bare", "masks"):
        (world / folder).mkdir()
    for number, path in enumerate(sorted((world / "pictures").glob("?.png"))):
        mask.save(world / "pictures" / f"{path.stem}.mask.png")
        mask.save(world / "masks" / path.name)
        (world / "pictures" / f"{path.stem}.tags").write_text(f"star, ring, red, blue, {number}")
        picture = Image.open(path).rotate(180)
        picture.save(world / "bare" / path.name)
        picture.putalpha(mask.resize(picture.size))
        picture.save(world / "more" / path.name)
        (world / "more" / f"{path.stem}.txt").write_text("a blue ring")
    (world / "bare" / "9.txt").write_text("a blue ring")
    for name, file in (("lora", "first"), ("tokens", "token")):
        settings = settings_of(world, name, world / file, train={"steps": 2})
        train(settings)
        Path(settings.output.file).rename(world / f"{file}.safetensors")
    return world


@pytest.fixture(scope="module")
def learned(world, tmp_path_factory):
    """The weights that a run of three steps begins with, and those that it ends with."""
    known: dict[str, tuple[dict[str, torch.Tensor], ...]] = {}

    def learn(sections: Sections) -> tuple[dict[str, torch.Tensor], ...]:
        key = json.dumps(sections, sort_keys=True)
        if key not in known:
            loop = loop_of(
                settings_of(world, run=tmp_path_factory.mktemp("run"), **{"name": "lora", **sections})
            )
            before = {name: value.clone() for name, value in loop.state.items()}
            assert loop.run().finished
            known[key] = before, {name: value.clone() for name, value in loop.state.items()}
        return known[key]

    return learn


def merged(*given: Sections) -> Sections:
    result: Sections = {"train": {"steps": 3, "warmup": 0}}
    for sections in given:
        for name, values in sections.items():
            result[name] = {**result.get(name, {}), **values} if isinstance(values, dict) else values
    return result


@pytest.mark.parametrize(("row", "number"), CASES)
def test_a_setting_changes_what_is_learned(world, learned, monkeypatch, row, number):
    monkeypatch.chdir(world)
    without, changed = FEATURES[row][number]
    _, plain = learned(merged(without))
    before, after = learned(merged(without, changed))
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert not same(before, after)
    assert not same(plain, after)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "json", "tar"])
def test_captions_and_pictures_teach_the_same_wherever_they_stand(
    world, learned, monkeypatch, tmp_path, kind
):
    """As text files beside pictures in a folder."""
    monkeypatch.chdir(world)
    names = [f"{number}.png" for number in range(4)]
    folders = {name: tmp_path / name / "set" for name in ("beside", kind)}
    for folder in folders.values():
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_bytes((world / "bare" / name).read_bytes())
    for number, name in enumerate(names):
        (folders["beside"] / name).with_suffix(".txt").write_text(f"picture {number}")
    lines = [{"file_name": name, "text": f"picture {number}"} for number, name in enumerate(names)]
    given: Sections = {"folder": str(folders[kind])}
    if kind == "jsonl":
        (folders[kind] / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    elif kind == "csv":
        rows = ["file_name,text", *(f"{line['file_name']},{line['text']}" for line in lines)]
        (folders[kind] / "metadata.csv").write_text("\n".join(rows))
    elif kind == "json":
        for line in lines:
            (folders[kind] / line["file_name"]).with_suffix(".json").write_text(
                json.dumps({"caption": line["text"]})
            )
    else:
        given = {"tars": [str(write_tar(tmp_path / "set.tar", folders["beside"]))]}
    _, beside = learned(merged({"data": {"sets": [{"folder": str(folders["beside"])}]}}))
    _, otherwise = learned(merged({"data": {"sets": [given]}}))
    assert same(beside, otherwise)
