"""Pictures that prompt for training pictures: found beside them, embedded once, and given to Stage C by chance."""

import io
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.training.data.batches import TrainingData
from cascade_nodes.cascade_core.training.data.image_prompts import ImagePrompts
from cascade_nodes.cascade_core.training.data.pictures import ORIENTATION, read_whole
from cascade_nodes.cascade_core.training.data.sources import find_pictures
from cascade_nodes.cascade_core.training.run import prepare
from cascade_nodes.cascade_core.training.settings import DataSettings, resolve, settings_of
from cascade_nodes.cascade_core.vision import ImageEncoder, build_vision_model
from cascade_nodes.tests.core import training_runs
from cascade_nodes.tests.core.training_sets import MeanColours, blocks, write_set, write_tar

CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "projection_dim": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
PROMPTS = [0, 2, 1, 0, 2, 2, 1]  # of each picture of the set, by number


def encoder(seed=0) -> ImageEncoder:
    torch.manual_seed(seed)
    return ImageEncoder(build_vision_model(CONFIG).eval())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Seven pictures with none, one or two prompts each, numbered from 9 and 10, so that order is by number."""
    folder = write_set(tmp_path_factory.mktemp("prompts") / "set", [(64, 64)] * 7)
    add_prompts(folder)
    return folder


def add_prompts(folder: Path) -> None:
    for number, count in enumerate(PROMPTS):
        for prompt in range(count):
            place = folder / ("more" if number % 2 else ".") / f"{number:03}.prompt{9 + prompt}.png"
            blocks(40, 50, seed=100 * number + prompt).save(place)


def open_data(folder=None, prompts=None, tars=(), seed=0, **settings) -> TrainingData:
    given = {"folder": str(folder) if folder else None, "tars": tars, "size": 64, "bucket_step": 32}
    data = DataSettings(**{**given, "image_prompt_dropout": 0.0, **settings})
    return TrainingData(data, MeanColours(), "mean", seed, image_prompts=prompts)


def batches(data, epochs=1, size=2):
    return [data.batch(step, size) for step in range(epochs * data.steps_per_epoch(size))]


def same_prompts(a, b) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def pixels_of(path: Path) -> torch.Tensor:
    return read_whole(path.read_bytes(), 1000).movedim(0, -1)[None] / 255


# Where they are found


def test_prompts_lie_beside_their_pictures(folder):
    pictures, skipped = find_pictures(folder, ())
    assert skipped == []
    assert {each.name: [prompt.name for prompt in each.image_prompts] for each in pictures} == {
        "000.png": [],
        "002.png": ["002.prompt9.png"],
        "004.png": ["004.prompt9.png", "004.prompt10.png"],
        "006.png": ["006.prompt9.png"],
        "more/001.png": ["more/001.prompt9.png", "more/001.prompt10.png"],
        "more/003.png": [],
        "more/005.png": ["more/005.prompt9.png", "more/005.prompt10.png"],
    }


def test_a_tar_holds_the_same_prompts(folder, tmp_path):
    single, _ = find_pictures(folder, ())
    packed, skipped = find_pictures(None, (str(write_tar(tmp_path / "set.tar", folder)),))
    assert skipped == []
    by_name = {f"set.tar/{each.name}": each for each in single}
    assert len(packed) == len(by_name)
    for each in packed:
        alone = by_name[each.name]
        assert [p.name for p in each.image_prompts] == [f"set.tar/{p.name}" for p in alone.image_prompts]
        assert [p.read() for p in each.image_prompts] == [p.read() for p in alone.image_prompts]


def test_a_picture_that_is_named_like_a_prompt_is_one_where_there_is_nothing_to_prompt_for(tmp_path):
    blocks(64, 64, seed=0).save(tmp_path / "my.prompt1.png")
    (tmp_path / "my.prompt1.txt").write_text("a picture")
    pictures, _ = find_pictures(tmp_path, ())
    assert [(each.name, each.image_prompts) for each in pictures] == [("my.prompt1.png", ())]


# What becomes of them


def test_embeddings_are_those_of_the_nodes(folder):
    held, other = encoder(), encoder()
    data = open_data(folder, ImagePrompts(held))
    seen = Counter()
    for batch in batches(data):
        numbers = [int(name[-7:-4]) for name in batch.keys]
        assert len({PROMPTS[number] for number in numbers}) == 1  # all rows have as many
        if batch.image_prompts is None:
            assert PROMPTS[numbers[0]] == 0
            continue
        assert batch.image_prompts.shape == (len(numbers), PROMPTS[numbers[0]], 12)
        for name, rows in zip(batch.keys, batch.image_prompts, strict=True):
            stem = folder / name.removesuffix(".png")
            for prompt, row in enumerate(rows):
                expected = other.encode(pixels_of(Path(f"{stem}.prompt{9 + prompt}.png")))[0]
                assert (row - expected).abs().max() < 1e-5 * expected.abs().max()
                seen[name] += 1
    assert sum(seen.values()) == sum(PROMPTS)


def test_a_prompt_is_read_upright_and_whole():
    stored = blocks(40, 60, seed=1)
    exif, stream = Image.Exif(), io.BytesIO()
    exif[ORIENTATION] = 6
    stored.save(stream, "PNG", exif=exif)
    turned = torch.from_numpy(np.array(stored.transpose(Image.Transpose.ROTATE_270)))
    assert torch.equal(read_whole(stream.getvalue(), 28), turned.permute(2, 0, 1))


def test_prompts_are_left_out_by_chance_apart_from_captions(folder):
    data = open_data(folder, ImagePrompts(encoder()), image_prompt_dropout=0.4, caption_dropout=0.5)
    without = {"image": 0, "text": 0, "both": 0}
    rows = 0
    for batch in batches(data, epochs=120):
        if batch.image_prompts is None:
            continue
        for caption, prompts in zip(batch.captions, batch.image_prompts, strict=True):
            left_out = bool((prompts == 0).all())
            assert left_out or bool((prompts != 0).any(dim=1).all())  # all of a picture's, or none
            without["image"] += left_out
            without["text"] += caption == ""
            without["both"] += left_out and caption == ""
            rows += 1
    assert rows == 120 * 5
    assert abs(without["image"] / rows - 0.4) < 0.06
    assert abs(without["text"] / rows - 0.5) < 0.06
    assert abs(without["both"] / rows - 0.2) < 0.05


def test_batches_are_a_function_of_the_step_and_shared_by_ranks(folder):
    one, other = (open_data(folder, ImagePrompts(encoder()), image_prompt_dropout=0.3) for _ in range(2))
    for step in (11, 3, 0, 7):
        whole, again = one.batch(step, 4), other.batch(step, 4)
        shares = [one.batch(step, 2, rank, 2) for rank in range(2)]
        assert whole.keys == again.keys
        if whole.image_prompts is None:
            assert again.image_prompts is None
            continue
        assert again.image_prompts is not None
        assert torch.equal(whole.image_prompts, again.image_prompts)
        if len(whole.keys) > 1:
            for rank, share in enumerate(shares):
                assert share.image_prompts is not None
                assert torch.equal(share.image_prompts, whole.image_prompts[rank::2])


def test_without_an_encoder_prompts_change_nothing(folder, tmp_path):
    plain = write_set(tmp_path, [(64, 64)] * 7)
    one, other = open_data(folder), open_data(plain)
    for a, b in zip(batches(one, 3), batches(other, 3), strict=True):
        assert (a.keys, a.captions) == (b.keys, b.captions)
        assert torch.equal(a.latents, b.latents)
        assert a.image_prompts is None
    assert one.summary() == (
        "7 pictures with 7 captions: 7 of 64 × 64; the image prompts of 5 are not used, as models.image_encoder is "
        "not given."
    )


def test_the_summary_counts_prompts(folder):
    assert open_data(folder, ImagePrompts(encoder())).summary() == (
        "7 pictures with 7 captions: 2 of 64 × 64, 2 of 64 × 64 with 1 image prompt, 3 of 64 × 64 with 2 image prompts."
    )


# The cache


class Counting(ImageEncoder):
    """Counts the pictures that it is given."""

    pictures = 0

    def encode_pixels(self, pixels):
        self.pictures += len(pixels)
        return super().encode_pixels(pixels)


def counting(seed=0) -> Counting:
    return Counting(encoder(seed).model)


def test_prompts_are_encoded_once(tmp_path):
    folder, cache = write_set(tmp_path / "set", [(64, 64)] * 7), str(tmp_path / "cache")
    add_prompts(folder)
    first, again = counting(), counting()
    one = open_data(folder, ImagePrompts(first, cache), cache=cache)
    assert first.pictures == sum(PROMPTS)
    other = open_data(folder, ImagePrompts(again, cache), cache=cache)
    assert again.pictures == 0
    for a, b in zip(batches(one), batches(other), strict=True):
        assert a.keys == b.keys
        assert same_prompts(a.image_prompts, b.image_prompts)

    changed = folder / "002.prompt9.png"
    blocks(40, 50, seed=77).save(changed)
    os.utime(changed, ns=(1, 1))
    anew = counting()
    open_data(folder, ImagePrompts(anew, cache), cache=cache)
    assert anew.pictures == 1
    another = counting(seed=1)
    open_data(folder, ImagePrompts(another, cache), cache=cache)
    assert another.pictures == sum(PROMPTS)


# What is wrong


def test_a_picture_with_a_damaged_prompt_is_left_out_and_named(tmp_path):
    folder = write_set(tmp_path, [(64, 64)] * 7)
    add_prompts(folder)
    (folder / "004.prompt10.png").write_bytes(b"no picture")
    data = open_data(folder, ImagePrompts(encoder()))
    assert len(data) == 6
    assert [str(each) for each in data.skipped] == [
        "004.png (its image prompt 004.prompt10.png: not a picture)"
    ]


def test_an_encoder_without_prompts_is_refused(tmp_path):
    folder = write_set(tmp_path, [(64, 64)])
    with pytest.raises(CascadeError, match=r"no picture has image prompts; put them .*0001.prompt0.png"):
        open_data(folder, ImagePrompts(encoder()))


def test_an_encoder_of_another_width_is_refused(tmp_path):
    world = training_runs.write_world(tmp_path)
    path = world / "models" / "clip_vision" / "tiny_vision.safetensors"
    model = encoder().model
    training_runs.save(path, model, {"config": json.dumps(CONFIG)})
    settings = training_runs.settings_of(world, "lora with image prompts", tmp_path / "run")
    with pytest.raises(CascadeError, match=r"image_encoder gives vectors of 12, but this Stage C takes 48"):
        prepare(settings, training_runs.build_accelerator())


def test_the_image_encoder_is_looked_up_as_the_loaders_do():
    values = {
        "data": {"folder": "x"},
        "output": {"file": "y"},
        "models": {"image_encoder": "vision.safetensors"},
    }
    asked = {}

    def find(role: str, name: str) -> Path:
        asked[role] = name
        return Path("/models") / role / name

    settings = resolve(settings_of(values, "lora", "here"), Path("/"), find)
    assert settings.models.image_encoder == "/models/vision/vision.safetensors"
    assert asked["vision"] == "vision.safetensors"
    assert "image_encoder" not in asked
