"""Several data sets, captions that vary, captions in tables and JSON, and a run that shows what it would see."""

import json
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.training.data.batches import TrainingData
from cascade_nodes.cascade_core.training.data.captions import trained_captions
from cascade_nodes.cascade_core.training.data.sources import find_pictures
from cascade_nodes.cascade_core.training.dry_run import dry_run
from cascade_nodes.cascade_core.training.identity import differences
from cascade_nodes.cascade_core.training.losses import diffusion_loss
from cascade_nodes.cascade_core.training.run import train
from cascade_nodes.cascade_core.training.settings import DataSetSettings, DataSettings
from cascade_nodes.cascade_core.training.typed_yaml import build
from cascade_nodes.tests.core.training_runs import settings_of, write_world
from cascade_nodes.tests.core.training_sets import MeanColours, blocks, write_set


def data_of(**settings) -> TrainingData:
    return TrainingData(build(DataSettings, {"size": 256, **settings}), MeanColours(), "mean")


def test_each_set_is_shown_and_weighed_in_its_own_way(tmp_path):
    for name, count in (("own", 2), ("others", 5), ("plain", 3)):
        write_set(tmp_path / name, [(256, 256)] * count)
    data = data_of(
        folder=str(tmp_path / "plain"),
        sets=[
            {"folder": str(tmp_path / "own"), "repeat": 4, "trigger": "sks"},
            {"folder": str(tmp_path / "others"), "weight": 0.25},
        ],
        trigger="a photo",
        caption_dropout=0,
    )
    assert len(data) == 10
    assert data.rows_per_epoch == 3 + 4 * 2 + 5
    batches = [data.batch(step, 4) for step in range(data.steps_per_epoch(4))]
    shown = [
        (caption, weight)
        for batch in batches
        for caption, weight in zip(
            batch.captions,
            (batch.weights if batch.weights is not None else torch.ones(4)).tolist(),
            strict=True,
        )
    ]
    assert sorted(caption.partition(",")[0] for caption, _ in shown) == ["a photo"] * 8 + ["sks"] * 8
    assert sorted(weight for _, weight in shown) == [0.25] * 5 + [1.0] * 11
    assert len({caption for caption, _ in shown if caption.startswith("sks")}) == 2


def test_a_pictures_weight_is_of_its_loss():
    def loss(weights):
        torch.manual_seed(0)
        return diffusion_loss(lambda x, r: x, torch.randn(4, 16, 3, 3), picture_weights=weights)["loss"]

    parts = [loss(torch.eye(4)[i]) for i in range(4)]
    assert torch.allclose(loss(None), torch.stack(parts).sum(), rtol=1e-5)
    assert torch.allclose(
        loss(torch.tensor([1, 0.5, 0, 2])), parts[0] + parts[1] / 2 + 2 * parts[3], rtol=1e-5
    )


def test_a_run_of_sets_goes_on_wherever_they_lie(tmp_path):
    world = write_world(tmp_path)
    folder = world / "pictures"

    def settings(place, **more):
        sets = [{"folder": str(place), "weight": 0.5, "repeat": 2, **more}]
        return settings_of(world, "lora", tmp_path / "run", data={"sets": sets}, train={"steps": 2})

    before = settings(folder)
    train(before)
    metadata = {"settings": before.as_json(), "contents": ""}
    assert differences(settings(tmp_path / "elsewhere"), {}, metadata) == []
    assert "data.sets" in differences(settings(folder, repeat=3), {}, metadata)[0]


def test_tags_in_another_order_with_some_left_out():
    settings = build(
        DataSettings,
        {"folder": "x", "shuffle_tags": True, "keep_tags": 1, "tag_dropout": 0.3, "caption_variants": 20},
    )
    tags = ["girl", "hat", "tree", "sky", "sea"]
    variants = trained_captions([", ".join(tags)], settings)
    # Variants come from the caption alone.
    assert variants == trained_captions([",".join(tags)], settings) or len(variants) > 5
    split = [variant.split(", ") for variant in variants]
    assert all(variant[0] == "girl" for variant in split)
    assert all(len(set(variant)) == len(variant) and set(variant) <= set(tags) for variant in split)
    assert len({tuple(sorted(variant)) for variant in split}) > 3
    assert any(len(variant) == 5 and variant != tags for variant in split)
    assert trained_captions(["a, b"], DataSettings(folder="x")) == ("a, b",)  # as it stands, blanks and all
    assert trained_captions(["", "a"], DataSettings(folder="x", trigger="sks")) == ("sks", "sks, a")


def test_captions_of_tables_and_of_json(tmp_path):
    for name in ("a", "b", "c", "d"):
        blocks(64, 64, 1).save(tmp_path / f"{name}.png")
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"a star, red"\n', encoding="utf-8-sig")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "a ring"}\n')
    (tmp_path / "c.json").write_text(json.dumps({"captions": ["one", "two"]}))
    (tmp_path / "d.json").write_text("[]")
    pictures, skipped = find_pictures(tmp_path, ())
    assert {each.name: each.captions for each in pictures} == {
        "a.png": ("a star, red",),
        "b.png": ("a ring",),
        "c.png": ("one", "two"),
    }
    assert [str(each) for each in skipped] == ["d.png (no caption)"]


@pytest.mark.parametrize(
    "text", ["name,text\na.png,x\n", 'file_name,text\n"a.png,x\n', "file_name,text\na.png\0,x\n"]
)
def test_a_table_that_is_none(tmp_path, text):
    blocks(64, 64, 1).save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(
        CascadeError, match=r"metadata.csv.*(names the columns|is not of a table|cannot)|holds 1 picture"
    ):
        find_pictures(tmp_path, ())


@pytest.mark.parametrize(
    ("text", "columns"),
    [("file_name;text\na.png;x\n", "file_name;text"), ("a.png,a star\n", "a.png', 'a star")],
)
def test_a_table_without_its_columns_says_which_are_expected(tmp_path, text, columns):
    """Semicolons, as spreadsheets in some languages write them, and no first line of names."""
    blocks(64, 64, 1).save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text(text)
    sentence = f"metadata.csv, line 1 names the columns ['{columns}']; file_name and text are expected"
    with pytest.raises(CascadeError, match=re.escape(sentence)):
        find_pictures(tmp_path, ())


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"sets": [{"repeat": 2}]}, "a set has neither a folder nor tars"),
        ({"sets": [{"folder": "x", "weight": -1}]}, "data.sets.weight is -1.0; it must be at least 0"),
        ({"sets": [{"folder": "x"}] * 101}, "data.sets has 101 entries; give at most 100"),
        ({"folder": "x", "tag_separator": " "}, "a sign such as , or ; is expected"),
        ({"folder": "x", "trigger": "x" * 501}, "at most 500 characters"),
    ],
)
def test_settings_that_make_no_sense(values, sentence):
    with pytest.raises(CascadeError, match=sentence):
        build(DataSettings, values)


def test_a_dry_run_prints_the_buckets_and_draws_a_page(tmp_path):
    folder = write_set(tmp_path / "set", [(256, 256), (256, 256), (80, 512), (8, 8)])
    world = write_world(tmp_path)
    settings = settings_of(world, "lora", tmp_path / "run", data={"size": 256, "bucket_step": 64})
    settings = replace(settings, data=replace(settings.data, folder=str(folder)))
    told: list[str] = []
    path = dry_run(settings, told.append)
    assert told[1] == "256 × 256: 2, such as 000.png: picture 0, text 0"
    assert told[0] == "320 × 192: 1, such as 002.png: picture 2, text 0"
    assert told[2].startswith(
        "1 is smaller and enlarged, 002.png the most, 2.4 times; 1 is cropped by more than 10%"
    )
    assert told[3].startswith("left out: more/003.png (8 × 8 pixels are too few")
    assert told[4] == f"3 of 4 pictures would be trained on; {path} shows some."
    assert Image.open(path).size == (2 * 192 + 4, 2 * 192 + 4)
    assert not (tmp_path / "run" / "state.safetensors").exists()


def test_a_set_alone_is_enough():
    assert DataSettings(sets=(DataSetSettings(folder="x"),)).folder is None
