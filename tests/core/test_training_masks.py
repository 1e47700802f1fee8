"""Masks beside pictures, crops at random places, sizes and captions of sets: what reaches the loss."""

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.training.data.batches import TrainingData
from cascade_nodes.cascade_core.training.data.sources import find_all
from cascade_nodes.cascade_core.training.dry_run import dry_run
from cascade_nodes.cascade_core.training.identity import contents_of, differences
from cascade_nodes.cascade_core.training.losses import diffusion_loss
from cascade_nodes.cascade_core.training.settings import DataSettings, Settings
from cascade_nodes.cascade_core.training.typed_yaml import build
from cascade_nodes.tests.core.training_runs import (
    loop_of,
    run_until_killed,
    same,
    settings_of,
    write_world,
)
from cascade_nodes.tests.core.training_sets import MeanColours, blocks, write_set, write_tar


def data_of(**settings) -> Any:
    values = {"size": 256, "caption_dropout": 0, **settings}
    return TrainingData(build(DataSettings, values), MeanColours(), "mean")


def half_white(width: int = 256, height: int = 256) -> Image.Image:
    """A mask whose left half is white."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, width // 2, height))
    return mask


def write_masked(folder, mask=half_white, name="a.mask.png"):
    folder.mkdir(exist_ok=True, parents=True)
    blocks(256, 256, 1).save(folder / "a.png")
    (folder / "a.txt").write_text("a")
    mask().save(folder / name)
    return folder


@pytest.mark.parametrize("name", ["a.mask.png", "a-masklabel.png", "a.mask.jpg"])
def test_a_mask_beside_a_picture_weighs_its_places(tmp_path, name):
    folder = write_masked(tmp_path / "set", name=name)
    data = data_of(folder=str(folder), masks="beside", unmasked_weight=0.25)
    assert len(data) == 1
    assert data.skipped == []
    (masks,) = data.batch(0, 1).masks
    assert masks.shape == data.batch(0, 1).latents.shape[-2:]
    assert masks.mean().item() == pytest.approx(1)
    assert torch.allclose(masks[:, -1] / masks[:, 0], torch.tensor(0.25), atol=0.01)


def test_masks_of_tars_of_a_folder_and_of_transparency(tmp_path):
    folder = write_masked(tmp_path / "set")
    expected = data_of(folder=str(folder), masks="beside").batch(0, 1).masks
    tar = data_of(tars=[str(write_tar(tmp_path / "set.tar", folder))], masks="beside")
    assert torch.equal(tar.batch(0, 1).masks, expected)

    (tmp_path / "masks").mkdir()
    (folder / "a.mask.png").rename(tmp_path / "masks" / "a.png")
    apart = data_of(folder=str(folder), mask_folder=str(tmp_path / "masks"))
    assert torch.equal(apart.batch(0, 1).masks, expected)

    picture = Image.open(folder / "a.png").convert("RGBA")
    picture.putalpha(half_white())
    picture.save(folder / "a.png")
    assert torch.equal(data_of(folder=str(folder), masks="alpha").batch(0, 1).masks, expected)


def test_no_mask_is_used_or_shown_unasked(tmp_path):
    data = data_of(folder=str(write_masked(tmp_path / "set")), caption="a thing")
    assert len(data) == 1
    assert data.batch(0, 1).masks is None
    assert "data.masks: beside makes use of it" in str(data.skipped[0])


def test_pictures_without_a_mask_count_everywhere(tmp_path):
    folder = write_masked(tmp_path / "set")
    blocks(256, 256, 2).save(folder / "b.png")
    (folder / "b.txt").write_text("b")
    data = data_of(folder=str(folder), masks="beside", unmasked_weight=0)
    batch = data.batch(0, 2)
    by_caption = dict(zip(batch.captions, batch.masks, strict=True))
    assert torch.equal(by_caption["b"], torch.ones_like(by_caption["b"]))
    assert by_caption["a"][:, -1].max() == 0
    always = data_of(folder=str(folder), masks="beside", unmasked_share=1.0).batch(0, 2)
    assert torch.equal(always.masks, torch.ones_like(always.masks))


def test_a_small_mask_has_as_much_of_the_loss_as_a_large_one():
    """The same error everywhere is the same loss behind any mask, and what lies outside of it does not count."""

    def loss(masks, error):
        torch.manual_seed(0)
        x0 = torch.zeros(2, 16, 6, 6)  # at pure noise, which is then what the network is given
        return diffusion_loss(lambda noised, r: noised + error, x0, pure_noise_share=1.0, masks=masks)

    small, large = torch.zeros(2, 6, 6), torch.zeros(2, 6, 6)
    small[:, 2, 2], large[:, 1:] = 36.0, 36 / 30
    outside = torch.zeros(2, 16, 6, 6)
    outside[:, :, 0, 0] = 1000.0
    plain = loss(None, 1.0)
    for masks in (small, large, torch.ones(2, 6, 6)):
        assert loss(masks, 1.0)["loss"].item() == pytest.approx(plain["loss"].item(), rel=1e-3)
    for masks in (small, large):
        assert torch.equal(loss(masks, 1.0 + outside)["loss"], loss(masks, 1.0)["loss"])
    assert torch.equal(loss(torch.ones(2, 6, 6), 1.0)["loss"], plain["loss"])


def test_each_picture_is_shown_in_several_sizes(tmp_path):
    """It is shown once in each, with latents of its own; in none that would enlarge it too much, in none twice."""
    large = write_set(tmp_path / "large", [(512, 512)] * 2)
    small = write_set(tmp_path / "small", [(256, 256)])
    sets = [{"folder": str(large)}, {"folder": str(small), "more_sizes": [320, 384]}]
    data = data_of(sets=sets, size=256, more_sizes=[512, 256], max_enlarge=1.3)
    shown = Counter((each.picture.set, each.picture.name, each.bucket) for each in data.pictures)
    assert set(shown.values()) == {1}
    sides = sorted(each.bucket.width for each in data.pictures)
    assert sides == [256, 256, 256, 320, 512, 512]  # 384 is 1.5 times the small one's side
    assert not data.skipped
    latents = {tuple(data.batch(step, 1).latents.shape[-2:]) for step in range(data.steps_per_epoch(1))}
    assert len(latents) == 3
    with pytest.raises(CascadeError, match=r"data.more_sizes has 8 sizes; give at most 7\."):
        data_of(folder=str(large), size=256, more_sizes=[256] * 8)
    with pytest.raises(
        CascadeError, match=r"data.more_sizes is 32; it must be at least 64 and at most 4,096\."
    ):
        data_of(folder=str(large), size=256, more_sizes=[32])


@pytest.mark.parametrize("orientation", [1, 3, 6, 7, 8])
def test_mask_and_picture_show_the_same_part_in_every_crop(tmp_path, orientation):
    """A picture that is its own mask: mean brightness and mask agree, mirrored, turned, and wherever it is cropped."""
    small = np.random.default_rng(3).integers(0, 256, (5, 7), dtype=np.uint8)
    upright = Image.fromarray(small).resize((700, 500), Image.Resampling.BICUBIC)
    turn = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90,
            7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}[orientation]  # fmt: skip
    stored = upright if turn is None else upright.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.convert("RGB").save(tmp_path / "a.jpg", quality=95, exif=exif)
    (tmp_path / "a.txt").write_text("a")
    upright.save(tmp_path / "a.mask.png")
    data = data_of(
        folder=str(tmp_path),
        masks="beside",
        unmasked_weight=0,
        flip=True,
        crops=4,
        crop_zoom=2.5,
        bucket_step=64,
    )
    seen = set()
    for step in range(24):
        batch = data.batch(step, 1)
        shown = batch.latents[0, 0]
        mask = batch.masks[0] * shown.mean()
        assert torch.allclose(mask, shown, atol=0.06)
        seen.add(tuple(shown.flatten().tolist()))
    assert len(seen) > 4  # crops, and mirrored ones


def test_crops_are_drawn_once_and_for_all_machines(tmp_path):
    folder = write_set(tmp_path / "set", [(300, 700), (256, 256)])
    settings = {"crops": 5, "cache": str(tmp_path / "cache")}
    first = data_of(folder=str(folder), **settings)
    encoder = MeanColours()
    again = TrainingData(
        build(DataSettings, {"size": 256, "folder": str(folder), "caption_dropout": 0, **settings}),
        encoder,
        "mean",
    )
    assert encoder.pictures == 0
    for step in range(8):
        assert torch.equal(first.batch(step, 2).latents, again.batch(step, 2).latents)
    (wide,) = (each for each in first._buckets if each.bucket.width > each.bucket.height)
    assert len({tuple(row.flatten().tolist()) for row in wide.all_latents()[0]}) == 5
    square = next(each for each in first._buckets if each.bucket.width == each.bucket.height)
    # Nothing is to be cut off it.
    assert len({tuple(row.flatten().tolist()) for row in square.all_latents()[0]}) == 1


def test_images_of_a_controlnet_are_cropped_like_the_latents(tmp_path):
    folder = write_set(tmp_path / "set", [(300, 700)] * 3)
    settings = build(DataSettings, {"size": 256, "folder": str(folder), "crops": 3, "flip": True})
    data: Any = TrainingData(settings, MeanColours(), "mean", with_images=True)
    for step in range(6):
        batch = data.batch(step, 2)
        assert torch.allclose(MeanColours()(batch.images.float() / 255), batch.latents, atol=1e-5)


def test_no_crop_enlarges_a_picture(tmp_path):
    write_set(tmp_path / "set", [(256, 256)])
    data = data_of(folder=str(tmp_path / "set"), crops=6, crop_zoom=8)
    (picture,) = data.pictures
    assert {crop.zoom for crop in data.crops.all_of(picture)} == {1.0}


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (lambda: half_white(512, 256), "its mask has other proportions than the picture"),
        (lambda: Image.new("L", (256, 256)), "its mask is black all over"),
    ],
)
def test_a_mask_that_does_not_fit_leaves_its_picture_out(tmp_path, mask, reason):
    folder = write_masked(tmp_path / "set", mask)
    blocks(256, 256, 2).save(folder / "b.png")
    (folder / "b.txt").write_text("b")
    data = data_of(folder=str(folder), masks="beside", unmasked_weight=0)
    assert [reason in str(each) for each in data.skipped] == [True]
    (folder / "a.mask.png").write_bytes(b"no picture")
    again = data_of(folder=str(folder), masks="beside")
    assert "its mask: " in str(again.skipped[0])


def masked_world(folder):
    world = write_world(folder)
    for path in sorted((world / "pictures").glob("?.png")):
        half_white(*Image.open(path).size).save(path.with_suffix(".mask.png"))
    return world


MORE = {"masks": "beside", "unmasked_share": 0.3, "crops": 3, "crop_zoom": 1.5, "flip": True}


@pytest.mark.parametrize("name", ["lora", pytest.param("controlnet", marks=pytest.mark.nightly)])
def test_a_killed_run_with_masks_and_crops_resumes_bit_for_bit(tmp_path, name):
    world, few = masked_world(tmp_path), {"steps": 5}
    whole = loop_of(settings_of(world, name, tmp_path / "whole", data=MORE, train=few))
    assert whole.run().finished
    settings = settings_of(world, name, tmp_path / "killed", data=MORE, train=few)
    run_until_killed(settings, 4)
    resumed = loop_of(settings)
    assert resumed.resume()
    assert resumed.run().finished
    assert same(whole.task.trained.state_dict(), resumed.task.trained.state_dict())


def test_a_run_goes_on_with_the_same_masks_alone(tmp_path):
    world = masked_world(tmp_path)

    def contents(settings: Settings) -> dict[str, str]:
        pictures, _ = find_all(settings.data)
        return contents_of(settings, pictures, str(tmp_path / "cache"), 1)

    before = settings_of(world, "lora", tmp_path / "run", data=MORE)
    held = contents(before)
    metadata = {"settings": before.as_json(), "contents": json.dumps(held)}
    assert differences(before, held, metadata) == []
    (world / "pictures").rename(world / "moved")
    moved = replace(before, data=replace(before.data, folder=str(world / "moved")))
    assert contents(moved) == held
    Image.new("L", (80, 80), 200).save(world / "moved" / "0.mask.png")
    (difference,) = differences(moved, contents(moved), metadata)
    assert difference.startswith("pictures and captions")
    without = replace(moved, data=replace(moved.data, masks="none"))
    assert len(differences(without, contents(without), metadata)) == 2


def test_sets_have_sizes_captions_and_masks_of_their_own(tmp_path):
    for name in ("large", "tagged", "bare"):
        write_masked(tmp_path / name)
    (tmp_path / "tagged" / "a.tags").write_text("one, two")
    (tmp_path / "bare" / "a.txt").unlink()
    data = data_of(
        sets=[
            {"folder": str(tmp_path / "large"), "size": 512, "masks": "none"},
            {"folder": str(tmp_path / "tagged"), "caption_suffix": ".tags"},
            {"folder": str(tmp_path / "bare"), "caption": "a photo of sks"},
        ],
        masks="beside",
        size=256,
    )
    assert sorted(map(str, data._buckets)) == ["1 of 512 × 512", "2 of 256 × 256"]
    batches = [data.batch(step, 2) for step in range(2)]
    assert sorted(caption for batch in batches for caption in batch.captions) == [
        "a",
        "a photo of sks",
        "one, two",
    ]
    assert sorted(batch.masks is None for batch in batches) == [False, True]


def test_sides_of_buckets_have_bounds(tmp_path):
    folder = write_set(tmp_path / "set", [(100, 400), (400, 100), (300, 300)])
    within = data_of(folder=str(folder), min_bucket_side=192, max_bucket_side=320, max_aspect=4)
    assert {side for each in within._buckets for side in each.bucket} <= {192, 256, 320}
    free = data_of(folder=str(folder), max_aspect=4)
    assert {side for each in free._buckets for side in each.bucket} - {192, 256, 320}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"min_bucket_side": 512}, "data.size is 256, a bucket's side, which"),
        ({"sets": [{"folder": "x", "size": 4096}], "max_bucket_side": 1024}, "data.size is 4096"),
        ({"caption_suffix": "txt"}, "the ending of a file's name such as .txt is expected"),
        ({"masks": "above"}, "data.masks is 'above'|masks is 'above'"),
        ({"crops": 0}, "data.crops is 0; it must be at least 1"),
        ({"caption": "x" * 501}, "data.caption is .* at most 500"),
    ],
)
def test_settings_that_make_no_sense(values, sentence):
    with pytest.raises(CascadeError, match=sentence):
        build(DataSettings, {"folder": "x", "size": 256, **values})


def test_consistency_has_no_masks(tmp_path):
    with pytest.raises(CascadeError, match="leave masks out of data"):
        settings_of(tmp_path, "lora for few steps", tmp_path / "run", data={"masks": "alpha"})


def test_a_mask_folder_that_is_none_is_named(tmp_path):
    folder = write_masked(tmp_path / "set")
    with pytest.raises(CascadeError, match=r"data\.mask_folder .*nowhere is not a folder"):
        data_of(folder=str(folder), mask_folder=str(tmp_path / "nowhere"))


def test_the_contact_sheet_is_dark_outside_masks(tmp_path):
    world = write_world(tmp_path)
    folder = write_masked(tmp_path / "set")
    Image.new("RGB", (256, 256), "white").save(folder / "a.png")
    settings = settings_of(
        world, "lora", tmp_path / "run", data={"size": 256, "bucket_step": 64, "masks": "beside"}
    )
    page = dry_run(replace(settings, data=replace(settings.data, folder=str(folder))), lambda sentence: None)
    pixels = np.asarray(Image.open(page))
    assert pixels[96, 10].tolist() == [255] * 3
    assert pixels[96, 180].max() < 80
