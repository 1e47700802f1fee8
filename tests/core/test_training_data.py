"""Batches are a pure function of the step; latents are made once, and again where a picture changed."""

import os
import signal
import subprocess
import sys
from collections import Counter

import pytest
import torch

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.checkpoints.files import read_safetensors, write_safetensors
from cascade_nodes.cascade_core.errors import Interrupted
from cascade_nodes.cascade_core.networks.compressor import SemanticCompressor
from cascade_nodes.cascade_core.training.data import batches as data_module
from cascade_nodes.cascade_core.training.data import decoding, epochs
from cascade_nodes.cascade_core.training.data import latents as latents_module
from cascade_nodes.cascade_core.training.data.access import Access
from cascade_nodes.cascade_core.training.data.batches import TrainingData
from cascade_nodes.cascade_core.training.data.buckets import Bucket
from cascade_nodes.cascade_core.training.data.cache import fingerprint
from cascade_nodes.cascade_core.training.data.epochs import EpochPlan, epoch_repeats, generator
from cascade_nodes.cascade_core.training.data.pictures import read_picture
from cascade_nodes.cascade_core.training.settings import DataSettings
from cascade_nodes.tests.core.training_sets import MeanColours, blocks, write_set, write_tar


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """14 pictures in three buckets of 7, 4 and 3, with two captions each."""
    return write_set(tmp_path_factory.mktemp("pictures") / "set", captions=2)


def open_data(folder, encode=None, seed=0, with_images=False, report=None, **settings):
    settings = DataSettings(folder=str(folder), **{"size": 256, **settings})
    return TrainingData(settings, encode or MeanColours(), "mean", seed, with_images, report)


def epoch(data, number=0, batch_size=3, **ranks):
    steps = data.steps_per_epoch(batch_size, ranks.get("ranks", 1))
    return [data.batch(number * steps + step, batch_size, **ranks) for step in range(steps)]


def same_batch(a, b):
    same = a.keys == b.keys and a.captions == b.captions and torch.equal(a.latents, b.latents)
    return (
        same
        and ((a.images is None) == (b.images is None))
        and (a.images is None or torch.equal(a.images, b.images))
    )


# Order


def test_an_epoch_shows_each_picture_once_per_repeat(folder):
    data = open_data(folder)
    assert len(data) == 14
    assert data.steps_per_epoch(3) == 3 + 2 + 1
    names = Counter(name for batch in epoch(data) for name in batch.keys)
    assert len(names) == 14
    assert set(names.values()) == {1}
    repeated = open_data(folder, repeat=3)
    assert repeated.steps_per_epoch(3) == 7 + 4 + 3
    assert set(Counter(name for batch in epoch(repeated) for name in batch.keys).values()) == {3}


def test_a_batch_is_of_one_bucket_and_buckets_are_cut_evenly(folder):
    batches = epoch(open_data(folder))
    shapes = Counter((len(batch.keys), *batch.latents.shape[-2:]) for batch in batches)
    assert shapes == {(3, 6, 6): 1, (2, 6, 6): 2, (2, 5, 8): 2, (3, 8, 5): 1}
    assert {batch.latents.dtype for batch in batches} == {torch.float32}


def test_latents_belong_to_their_pictures_and_captions(folder):
    """The latent of a mean is the mean of the picture's bucket, worked out here from the file."""
    buckets = {"6 6": Bucket(256, 256), "5 8": Bucket(192, 320), "8 5": Bucket(320, 192)}
    for batch in epoch(open_data(folder, caption_dropout=0.0)):
        for name, caption, latent in zip(batch.keys, batch.captions, batch.latents, strict=True):
            number = int(name.removeprefix("more/").removesuffix(".png"))
            assert caption in (f"picture {number}, text 0", f"picture {number}, text 1")
            size = buckets["{} {}".format(*latent.shape[-2:])]
            pixels = read_picture((folder / name).read_bytes(), size, size.compressor).float() / 255
            expected = pixels.unflatten(2, (-1, 32)).unflatten(1, (-1, 32)).mean(dim=(2, 4))
            assert (latent[:3] - expected).abs().max() < 1e-5
            assert latent[3:].abs().max() == 0


def test_a_batch_is_a_function_of_the_step_alone(folder):
    one, other = open_data(folder, flip=True), open_data(folder, flip=True)
    forwards = [one.batch(step, 4) for step in range(20)]
    assert all(same_batch(other.batch(step, 4), forwards[step]) for step in (17, 3, 11, 0, 19))
    assert [batch.keys for batch in epoch(one, 0)] != [batch.keys for batch in epoch(one, 1)]
    assert [batch.keys for batch in epoch(one)] != [
        batch.keys for batch in epoch(open_data(folder, seed=1, flip=True))
    ]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_what_one_would_have(folder, ranks):
    data = open_data(folder, flip=True)
    alone = epoch(data, batch_size=3 * ranks)
    parts = [epoch(data, batch_size=3, rank=rank, ranks=ranks) for rank in range(ranks)]
    for whole, *shares in zip(alone, *parts, strict=True):
        rows = list(zip(whole.keys, whole.captions, whole.latents.unbind(), strict=True))
        for rank, share in enumerate(shares):
            mine = rows[rank::ranks]
            assert share.keys == [name for name, _, _ in mine]
            assert share.captions == [caption for _, caption, _ in mine]
            assert torch.equal(share.latents, torch.stack([latent for _, _, latent in mine]))


def test_no_rank_is_left_without_a_row(folder):
    data = open_data(folder)
    parts = [epoch(data, batch_size=1, rank=rank, ranks=8) for rank in range(8)]
    assert [len(part) for part in parts] == [3] * 8
    assert {len(batch.keys) for part in parts for batch in part} == {1}
    assert {name for part in parts for batch in part for name in batch.keys} == {
        name for batch in epoch(data) for name in batch.keys
    }


# Captions and mirroring


def test_captions_are_chosen_by_step_and_left_out_by_chance(folder):
    chosen = Counter(text for number in range(40) for batch in epoch(open_data(folder, caption_dropout=0.25), number)
                     for text in batch.captions)  # fmt: skip
    left_out = chosen.pop("")
    assert abs(left_out / (40 * 14) - 0.25) < 0.06
    assert len(chosen) == 28
    assert 5 <= min(chosen.values()) <= max(chosen.values()) <= 30  # 15 each, by chance
    assert {text for batch in epoch(open_data(folder, caption_dropout=1.0)) for text in batch.captions} == {
        ""
    }


def test_caption_ids_are_places_in_the_captions(folder):
    data = open_data(folder, caption_dropout=0.5)
    assert data.captions[0] == ""
    assert len(data.captions) == 29
    for batch in epoch(data):
        assert [data.captions[i] for i in batch.caption_ids.tolist()] == batch.captions


def test_half_of_the_rows_are_mirrored(folder):
    plain = {
        name: latent
        for batch in epoch(open_data(folder))
        for name, latent in zip(batch.keys, batch.latents, strict=True)
    }
    data, mirrored = open_data(folder, flip=True), 0
    for batch in (batch for number in range(20) for batch in epoch(data, number)):
        for name, latent in zip(batch.keys, batch.latents, strict=True):
            turned = (latent - plain[name].flip(-1)).abs().max() < 1e-5
            assert turned or torch.equal(latent, plain[name])
            mirrored += int(turned)
    assert abs(mirrored / (20 * 14) - 0.5) < 0.1


# Images


def test_images_are_what_the_compressor_read(folder):
    encode = MeanColours()
    data = open_data(folder, encode, flip=True, with_images=True)
    batches = [data.batch(step, 3) for step in range(6)]
    for batch in batches:
        assert batch.images is not None
        assert batch.images.dtype == torch.uint8
        assert (encode(batch.images.float() / 255) - batch.latents).abs().max() < 1e-5
    assert all(same_batch(data.batch(step, 3), batches[step]) for step in (5, 0, 4, 2))


def test_pictures_that_fit_in_memory_are_decoded_once(tmp_path):
    write_set(tmp_path, [(64, 64)] * 4)
    data, whole = (open_data(tmp_path, with_images=True) for _ in range(2))
    steps = data.steps_per_epoch(2)
    wanted = [whole.batch(step, 2) for step in range(2 * steps)]
    assert all(same_batch(data.batch(step, 2), wanted[step]) for step in range(steps))
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    assert all(same_batch(data.batch(step, 2), wanted[step]) for step in range(2 * steps))


def test_pictures_beyond_the_memory_are_decoded_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "CACHE_BYTES", 2 * 3 * 192 * 192)
    data = open_data(write_set(tmp_path, [(64, 64)] * 4), with_images=True)
    before = [data.batch(step, 2) for step in range(data.steps_per_epoch(2))]
    assert data._decoder is not None
    assert len(data._decoder.cached) == 2
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    with pytest.raises(CascadeError, match="no longer"):
        [data.batch(step, 2) for step in range(len(before), 3 * len(before))]


def test_a_picture_that_vanishes_is_named(tmp_path):
    data = open_data(write_set(tmp_path, [(64, 64)]), with_images=True)
    (tmp_path / "000.png").unlink()
    with pytest.raises(
        CascadeError, match=r"000.png could be read as its latent was made, but no longer \(No such"
    ):
        data.batch(0, 1)


# The cache


def test_latents_are_made_once(folder, tmp_path):
    progress = []
    first = MeanColours()
    data = open_data(folder, first, cache=str(tmp_path), report=lambda *counts: progress.append(counts))
    assert first.pictures == 14
    assert progress[-1] == (14, 14)
    assert progress == sorted(progress)
    again = MeanColours()
    cached = open_data(folder, again, cache=str(tmp_path))
    assert again.calls == 0
    assert all(same_batch(a, b) for a, b in zip(epoch(data), epoch(cached), strict=True))

    mirrored = MeanColours()
    open_data(folder, mirrored, cache=str(tmp_path), flip=True)
    assert mirrored.pictures == 14  # the mirrored ones alone
    larger = MeanColours()
    open_data(folder, larger, cache=str(tmp_path), size=320)
    assert larger.pictures == 14
    other = MeanColours()
    TrainingData(DataSettings(folder=str(folder), size=256, cache=str(tmp_path)), other, "another compressor")
    assert other.pictures == 14


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_each_row_of_a_batch_counts_alike_however_many_share_it(folder, ranks):
    """The mean of the processes' means, each weighted by its share of the batch; also for uneven and tiny batches."""
    data, sizes = open_data(folder), set()
    for step in range(data.steps_per_epoch(2, ranks)):
        counts: dict[str, float] = {}
        for rank in range(ranks):
            batch = data.batch(step, 2, rank, ranks)
            for key in batch.keys:
                counts[key] = counts.get(key, 0) + batch.share / len(batch.keys) / ranks
        sizes.add(len(counts) % ranks)
        assert list(counts.values()) == pytest.approx([1 / len(counts)] * len(counts))
    assert len(sizes) > 1
    assert data.batch(0, 2).share == 1


def test_a_changed_picture_is_encoded_anew(tmp_path):
    folder, cache = write_set(tmp_path / "set", [(256, 256)] * 4), str(tmp_path / "cache")
    open_data(folder, cache=cache)
    blocks(256, 256, seed=99).save(folder / "002.png")
    blocks(100, 256, seed=98).save(folder / "more" / "001.png")  # another bucket now
    (folder / "more" / "003.txt").write_text("a new caption is not a new picture")
    encode = MeanColours()
    cached = open_data(folder, encode, cache=cache)
    assert encode.pictures == 2
    assert "a new caption is not a new picture" in cached.captions
    fresh = open_data(folder)
    assert all(same_batch(a, b) for a, b in zip(epoch(cached), epoch(fresh), strict=True))


def test_an_interrupted_run_keeps_what_it_made(tmp_path, monkeypatch):
    monkeypatch.setattr(latents_module, "ENCODED_AT_ONCE", 2 * 192 * 192)
    folder, cache = write_set(tmp_path / "set", [(256, 256)] * 10), str(tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt):
        open_data(folder, MeanColours(fails_at=3), cache=cache)
    rest = MeanColours()
    data = open_data(folder, rest, cache=cache)
    assert rest.pictures == 4
    assert all(same_batch(a, b) for a, b in zip(epoch(data), epoch(open_data(folder)), strict=True))


KILLED = """
import os, signal, sys
from cascade_nodes.cascade_core.training.data import latents
from cascade_nodes.cascade_core.training.data.batches import TrainingData
from cascade_nodes.cascade_core.training.settings import DataSettings
from cascade_nodes.tests.core.training_sets import MeanColours
latents.ENCODED_AT_ONCE, latents.FILE_BYTES = 2 * 192 * 192, 2 * 16 * 6 * 6 * 4
encode = MeanColours()
def dies(images):
    if encode.calls == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(images)
TrainingData(DataSettings(folder=sys.argv[1], size=256, cache=sys.argv[2]), dies, "mean")
"""


def test_a_killed_run_leaves_a_valid_cache(tmp_path):
    folder, cache = write_set(tmp_path / "set", [(256, 256)] * 10), tmp_path / "cache"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(cache)], check=False)
    assert killed.returncode == -signal.SIGKILL
    rest = MeanColours()
    data = open_data(folder, rest, cache=str(cache))
    assert rest.pictures == 4
    assert all(same_batch(a, b) for a, b in zip(epoch(data), epoch(open_data(folder)), strict=True))


def test_a_damaged_file_of_the_cache_is_made_anew(tmp_path):
    folder, cache = write_set(tmp_path / "set", [(256, 256)] * 4), tmp_path / "cache"
    open_data(folder, cache=str(cache))
    (held,) = (cache / "mean").iterdir()
    held.write_bytes(held.read_bytes()[:-1000])
    (cache / "mean" / f".{held.name}.17.part").write_bytes(b"left by a killed run")
    encode = MeanColours()
    open_data(folder, encode, cache=str(cache))
    assert encode.pictures == 4
    encode = MeanColours()
    open_data(folder, encode, cache=str(cache))
    assert encode.calls == 0


def test_sets_beyond_memory_give_the_same_batches(folder, tmp_path, monkeypatch):
    whole = open_data(folder, flip=True)
    monkeypatch.setattr(data_module, "MAX_BYTES_IN_MEMORY", 0)
    mapped = open_data(folder, flip=True, cache=str(tmp_path))
    assert all(same_batch(a, b) for a, b in zip(epoch(whole), epoch(mapped), strict=True))
    for a, b in zip(whole._buckets, mapped._buckets, strict=True):
        assert torch.equal(a.all_latents(), b.all_latents())


def test_whole_buckets_as_tensors(folder):
    buckets = open_data(folder, flip=True)._buckets
    assert [tuple(each.all_latents().shape) for each in buckets] == [
        (4, 2, 16, 5, 8),
        (7, 2, 16, 6, 6),
        (3, 2, 16, 8, 5),
    ]
    assert [str(each.bucket) for each in buckets] == ["320 × 192", "256 × 256", "192 × 320"]
    assert [tuple(each.caption_ids.shape) for each in buckets] == [(4, 2), (7, 2), (3, 2)]
    assert torch.equal(
        torch.cat([each.caption_ids for each in buckets]).flatten().sort().values, torch.arange(1, 29)
    )
    (plain, mirrored) = buckets[1].all_latents().unbind(1)
    assert (plain.flip(-1) - mirrored).abs().max() < 1e-5


def test_pictures_with_fewer_captions_are_padded(tmp_path):
    folder = write_set(tmp_path, [(256, 256)] * 2, captions=3)
    (folder / "000.txt").write_text("the only one")
    (bucket,) = open_data(folder)._buckets
    assert bucket.caption_ids.tolist() == [[1, -1, -1], [2, 3, 4]]
    assert bucket.caption_counts.tolist() == [1, 3]


# Tars


def test_a_tar_trains_as_its_folder_does(folder, tmp_path):
    tar = write_tar(tmp_path / "set.tar", folder)
    settings = DataSettings(tars=(str(tar),), size=256, cache=str(tmp_path / "cache"), flip=True)
    packed = TrainingData(settings, MeanColours(), "mean", with_images=True)
    single = open_data(folder, flip=True, with_images=True)
    latents = {
        f"set.tar/{name}": rows
        for bucket in single._buckets
        for name, rows in zip(
            [each.picture.name for each in bucket.pictures], bucket.all_latents(), strict=True
        )
    }
    assert len(latents) == 14
    for bucket in packed._buckets:
        for each, rows in zip(bucket.pictures, bucket.all_latents(), strict=True):
            assert torch.equal(rows, latents[each.picture.name])
    assert set(packed.captions) == set(single.captions)
    encode = MeanColours()
    TrainingData(settings, encode, "mean")
    assert encode.calls == 0
    os.utime(tar, ns=(1, 1))  # another tar may lie there now
    TrainingData(settings, encode, "mean")
    assert encode.pictures == 28


# What is wrong


def test_damaged_pictures_are_left_out_and_named(tmp_path):
    folder = write_set(tmp_path, [(256, 256)] * 4 + [(200, 340)])
    data = (folder / "002.png").read_bytes()
    (folder / "002.png").write_bytes(data[:3000])  # its header is whole
    (folder / "more" / "001.png").write_bytes(b"no picture")
    (folder / "004.txt").unlink()
    opened = open_data(folder)
    assert len(opened) == 2
    reasons = {each.name: each.reason for each in opened.skipped}
    assert reasons.keys() == {"002.png", "more/001.png", "004.png"}
    assert "truncated" in reasons["002.png"]
    assert reasons["more/001.png"] == "not a picture"
    assert opened.summary() == (
        "2 pictures with 2 captions: 2 of 256 × 256; 3 are left out (left_out.txt lists all): 004.png (no caption), "
        f"more/001.png (not a picture), 002.png ({reasons['002.png']})."
    )
    for name in ("000.png", "more/003.png"):
        (folder / name).write_bytes(b"")
    with pytest.raises(
        CascadeError,
        match=r"^No picture can be trained on, of 4: .*000.png \(not a picture\) and 2 more alike",
    ):
        open_data(folder)


def test_small_pictures_are_enlarged_and_counted(tmp_path):
    data = open_data(write_set(tmp_path, [(48, 48), (256, 256), (80, 512), (300, 300), (100, 128)]))
    assert data.summary().endswith(
        "4 of 256 × 256; 3 are smaller and enlarged, 000.png the most, 5.33 times; 2 are cropped by more than 10%, "
        "002.png the most, of which 26% stays (data.max_enlarge, data.max_crop)."
    )


LIMITS = [(48, 48), (256, 256), (80, 512), (300, 300), (100, 128)]


@pytest.mark.parametrize(
    ("settings", "kept", "reason"),
    [
        ({"max_enlarge": 1}, "1 3", "it would be enlarged by a factor of more than 1 (data.max_enlarge)"),
        (
            {"max_enlarge": 2.6},
            "1 2 3 4",
            "it would be enlarged by a factor of more than 2.6 (data.max_enlarge)",
        ),
        ({"max_crop": 0.5}, "0 1 3 4", "more than 50% of it would be cropped (data.max_crop)"),
        ({"min_side": 90}, "1 3 4", "48 × 48 pixels are too few; give 90 a side or more"),
        ({"max_crop": 0.1, "max_aspect": 6.4, "bucket_step": 16}, "0 1 2 3 4", ""),
    ],
)
def test_limits_of_what_is_cropped_and_enlarged(tmp_path, settings, kept, reason):
    data = open_data(write_set(tmp_path, LIMITS), **settings)
    assert sorted(int(each.picture.path.stem) for each in data.pictures) == list(map(int, kept.split()))
    assert len(data.skipped) == 5 - len(data.pictures)
    assert any(each.reason == reason for each in data.skipped) == bool(reason)


def test_small_pictures_are_not_enlarged_where_that_is_asked_for(tmp_path):
    """They go into buckets of their own size; only what has less than 64 pixels a side grows to them."""
    data = open_data(write_set(tmp_path, LIMITS), enlarge=False)
    sizes = {int(each.picture.path.stem): str(each.bucket) for each in data.pictures}
    assert sizes == {0: "64 × 64", 1: "256 × 256", 2: "128 × 64", 3: "256 × 256", 4: "128 × 64"}
    assert [round(each.scale, 2) for each in sorted(data.pictures, key=lambda each: each.scale)][-1] == 1.33
    assert {batch.latents.shape[-2:] for batch in epoch(data)} == {(6, 6), (2, 2), (2, 3)}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"folder": None}, "neither a folder nor tars"),
        ({"size": 20}, "data.size is 20; it must be at least 64 and at most 4,096"),
        ({"bucket_step": 4}, "bucket_step is 4; it must lie within 8 and the size, 256"),
        ({"caption_dropout": 1.5}, "caption_dropout is 1.5; it must be at least 0 and at most 1"),
        ({"repeat": 0}, "repeat is 0; it must be at least 1"),
    ],
)
def test_settings_that_cannot_be(settings, sentence):
    with pytest.raises(CascadeError, match=sentence):
        DataSettings(**{"folder": "x", "size": 256, **settings})


def test_an_encoder_of_another_kind_is_refused(folder):
    with pytest.raises(
        CascadeError, match=r"latents of shape \(\d+, 3, \d+, \d+\) from \d+ pictures of 320 × 192"
    ):
        open_data(folder, lambda images: images)
    with pytest.raises(CascadeError, match="hold NaN or infinity"):
        open_data(folder, lambda images: MeanColours()(images) / 0)


def test_fingerprints_follow_the_weights():
    config = {"c_latent": 4, "stem": 8, "stages": [["fused", 1, 3, 1, 8, 1]], "c_last": 8}
    torch.manual_seed(0)
    network = SemanticCompressor.from_config(config)
    before = fingerprint(network)
    assert before == fingerprint(network)
    assert len(before) == 32
    network.get_parameter("mapper.0.weight").data[0, 0] += 1e-3
    assert fingerprint(network) != before
    assert fingerprint(network.half()) != fingerprint(network.float())


# Bounds


def test_a_plan_is_what_it_was_when_it_stood_in_memory():
    """Compares each batch with torch's own permutations, joined and split."""
    counts, total, repeat = [7, 4, 3], 5, 4
    random = generator(3, "epoch", 2)
    whole = []
    for bucket, count in enumerate(counts):
        rows = torch.cat([torch.randperm(count, generator=random) for _ in range(repeat)])
        whole += [(bucket, part) for part in rows.tensor_split(-(-count * repeat // total))]
    order = torch.randperm(len(whole), generator=random).tolist()
    plan = EpochPlan(counts, total, repeat, 3, 2)
    assert len(order) == len(plan.order)
    for position, index in enumerate(order):
        bucket, rows = plan[position]
        assert bucket == whole[index][0]
        assert torch.equal(rows, whole[index][1])


def test_an_epoch_of_very_many_rows_is_cut(folder, monkeypatch):
    assert epoch_repeats(1000, 10_000) == 10_000
    assert epoch_repeats(100_000, 10_000) == 167
    assert epoch_repeats(2**30, 5) == 1
    monkeypatch.setattr(epochs, "MAX_ROWS", 30)
    data = open_data(folder, repeat=10_000)
    assert data.steps_per_epoch(7) == 2 + 2 + 1  # each picture twice
    first, last = data.batch(0, 2), data.batch(10**9, 2)
    assert len(first.keys) == len(last.keys) == 2


def rewrite(path, **tensors):
    held, metadata = read_safetensors(path)
    write_safetensors(path, {**{name: value.clone() for name, value in held.items()}, **tensors}, metadata)


@pytest.mark.parametrize(
    "damage",
    [
        {"rows": torch.zeros(4, 3, 6, 6)},
        {"rows": torch.zeros(4, 16, 6, 6, dtype=torch.int64)},
        {"rows": torch.zeros(3, 16, 6, 6)},
        {"rows": torch.tensor(1.0)},
        {"keys": torch.zeros(4, 16)},
        {"keys": torch.zeros(16, dtype=torch.uint8)},
        {"keys": torch.zeros(4, 4, dtype=torch.uint8)},
    ],
)
def test_rows_that_are_damaged_are_made_anew(tmp_path, damage):
    folder, cache = write_set(tmp_path / "set", [(256, 256)] * 4), tmp_path / "cache"
    before = open_data(folder, cache=str(cache))
    (latents,) = (cache / "mean").iterdir()
    (sizes,) = (cache / "sizes").iterdir()
    rewrite(latents, **damage)
    rewrite(sizes, rows=torch.zeros(4, 3, dtype=torch.int32))
    encode = MeanColours()
    again = open_data(folder, encode, cache=str(cache))
    assert encode.pictures == 4
    assert all(same_batch(a, b) for a, b in zip(epoch(before), epoch(again), strict=True))


def test_a_size_of_nothing_in_the_cache_is_a_picture_left_out(tmp_path):
    folder, cache = write_set(tmp_path / "set", [(256, 256)] * 4), tmp_path / "cache"
    open_data(folder, cache=str(cache))
    (sizes,) = (cache / "sizes").iterdir()
    rewrite(sizes, rows=torch.tensor([[0, 0], [-5, 7], [256, 256], [8, 256]], dtype=torch.int32))
    data = open_data(folder, cache=str(cache))
    assert len(data) == 1
    assert all("pixels are too few; give 16 a side or more" in each.reason for each in data.skipped)


@pytest.mark.nightly
def test_two_processes_fill_one_cache(tmp_path):
    folder, cache = write_set(tmp_path / "set", [(256, 256)] * 10), tmp_path / "cache"
    command = [sys.executable, "-c", FILLS, str(folder), str(cache)]
    running = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    encode = MeanColours()
    data = open_data(folder, encode, cache=str(cache))
    assert encode.calls == 0
    assert all(same_batch(a, b) for a, b in zip(epoch(data), epoch(open_data(folder)), strict=True))
    assert not list(cache.rglob("*.part"))


FILLS = """
import sys
from cascade_nodes.cascade_core.training.data import latents
from cascade_nodes.cascade_core.training.data.batches import TrainingData
from cascade_nodes.cascade_core.training.settings import DataSettings
from cascade_nodes.tests.core.training_sets import MeanColours
latents.ENCODED_AT_ONCE, latents.FILE_BYTES = 2 * 192 * 192, 2 * 16 * 6 * 6 * 4
TrainingData(DataSettings(folder=sys.argv[1], size=256, cache=sys.argv[2]), MeanColours(), "mean")
"""


def test_encoding_stops_when_it_is_asked_to_and_keeps_what_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(latents_module, "ENCODED_AT_ONCE", 2 * 192 * 192)
    folder, cache = write_set(tmp_path / "set", [(256, 256)] * 10), str(tmp_path / "cache")
    encode = MeanColours()
    settings = DataSettings(folder=str(folder), size=256, cache=cache)
    with pytest.raises(Interrupted):
        TrainingData(settings, encode, "mean", access=Access(lambda: encode.pictures >= 4))
    assert encode.pictures == 4
    rest = MeanColours()
    open_data(folder, rest, cache=cache)
    assert rest.pictures == 6
