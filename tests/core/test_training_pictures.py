"""Training pictures: buckets, crops, orientation, kinds of files; folders and tars; what is wrong is named."""

import glob
import io
import itertools
import json
import os
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features
from torch.nn import functional as F

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.errors import Interrupted
from cascade_nodes.cascade_core.geometry import STAGE_C_COMPRESSION
from cascade_nodes.cascade_core.training.data import access as access_module
from cascade_nodes.cascade_core.training.data.access import Access
from cascade_nodes.cascade_core.training.data.bucketing import assign_buckets
from cascade_nodes.cascade_core.training.data.buckets import Bucket, buckets, nearest
from cascade_nodes.cascade_core.training.data.cache import Cache
from cascade_nodes.cascade_core.training.data.pictures import (
    ORIENTATION,
    PictureError,
    picture_size,
    read_picture,
)
from cascade_nodes.cascade_core.training.data.sources import find_pictures, write_left_out
from cascade_nodes.cascade_core.training.data.tars import expand
from cascade_nodes.cascade_core.training.data.threads import map_in_threads
from cascade_nodes.cascade_core.training.settings import DataSettings
from cascade_nodes.nodes.sizes import compression_input, empty_stage_c
from cascade_nodes.tests.core.training_sets import blocks, png, write_set, write_tar

SQUARE = Bucket(256, 256)
LOSSLESS = ("PNG", "TIFF")


def test_buckets_have_about_one_area():
    sizes = buckets(1024, 64)
    assert len(sizes) == 19
    assert {Bucket(1024, 1024), Bucket(832, 1216), Bucket(1216, 832), Bucket(768, 1344)} <= set(sizes)
    assert {Bucket(b.width, b.height) for b in sizes} == set(sizes)
    assert all(0.9 * 1024**2 < b.height * b.width <= 1024**2 for b in sizes)
    assert max(b.width / b.height for b in sizes) == 1600 / 640
    assert buckets(250, 64) == (
        Bucket(192, 256), Bucket(192, 320), Bucket(250, 250), Bucket(256, 192), Bucket(320, 192),
    )  # fmt: skip


def test_buckets_have_the_latents_that_the_nodes_make():
    assert compression_input().default == STAGE_C_COMPRESSION
    for bucket in buckets(1024, 64):
        empty = empty_stage_c(1, bucket.height, bucket.width, STAGE_C_COMPRESSION)
        assert empty["samples"].shape[-2:] == bucket.latent
    assert Bucket(1024, 1024).latent == (24, 24)
    assert Bucket(832, 1216).latent == (20, 29)
    assert Bucket(832, 1216).compressor == (640, 928)


def test_a_picture_goes_to_the_nearest_aspect_ratio():
    sizes = buckets(1024, 64)
    assert nearest(sizes, 500, 500) == (1024, 1024)
    assert nearest(sizes, 2000, 3000) == (832, 1216)
    assert nearest(sizes, 9000, 1000) == (1600, 640)
    assert nearest(sizes, 1001, 1000) == (1024, 1024)


def test_pixels_are_the_centre_resized():
    """Left and right thirds of a 300 × 100 picture are cut off; the middle is red above, blue below."""
    pixels = np.zeros((100, 300, 3), np.uint8)
    pixels[:, :100], pixels[:, 200:] = 255, 255
    pixels[:50, 100:200], pixels[50:, 100:200] = (200, 0, 0), (0, 0, 100)
    read = read_picture(png(Image.fromarray(pixels)), SQUARE, (64, 64))
    assert read.dtype == torch.uint8
    assert read.shape == (3, 64, 64)
    assert read[:, :30, 2:-2].flatten(1).unique(dim=1).tolist() == [[200], [0], [0]]
    assert read[:, 34:, 2:-2].flatten(1).unique(dim=1).tolist() == [[0], [0], [100]]
    assert read[0, 0].max() < 210  # at the very edge, antialiasing mixes in a little of what is beyond


def test_pixels_are_those_of_the_nodes():
    """A picture of the bucket's size, as Cascade Encode resizes it for the compressor, but for 8-bit rounding."""
    bucket = Bucket(192, 320)
    picture = blocks(192, 320, seed=1)
    read = read_picture(png(picture), bucket, bucket.compressor).float() / 255
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    node = F.interpolate(image, bucket.compressor, mode="bicubic", antialias=True).clamp(0, 1)
    assert read.shape == (3, 160, 256)
    assert (read - node[0]).abs().max() < 1.05 / 255


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", *["AVIF"] * bool(features.check("avif"))])
def test_pictures_are_turned_upright(orientation, kind):
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    upright = blocks(120, 260, seed=4)  # stored as a camera does that was held so
    stored = upright.transpose(turn[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stream = io.BytesIO()
    stored.save(stream, kind, exif=exif, **({} if kind in LOSSLESS else {"quality": 98}))
    assert picture_size(stream.getvalue()) == (120, 260)
    bucket = Bucket(192, 320)
    read = read_picture(stream.getvalue(), bucket, bucket.compressor).float()
    expected = read_picture(png(upright), bucket, bucket.compressor).float()
    assert (read - expected).abs().mean() < (0.01 if kind in LOSSLESS else 3)
    assert (read - expected.flip(-1)).abs().mean() > 20


def first_pixel(picture: Image.Image, kind: str = "PNG", **options) -> list[int]:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return read_picture(stream.getvalue(), SQUARE, (8, 8))[:, 0, 0].tolist()


def test_every_kind_of_picture_becomes_rgb():
    sixteen_bits = Image.fromarray(np.full((40, 40), 100 * 257, np.uint16))
    assert first_pixel(sixteen_bits) == [100, 100, 100]
    assert first_pixel(Image.new("L", (40, 40), 7)) == [7, 7, 7]
    assert first_pixel(Image.new("RGBA", (40, 40), (255, 0, 0, 255))) == [255, 0, 0]
    assert first_pixel(Image.new("RGBA", (40, 40), (0, 0, 0, 0))) == [255, 255, 255]  # transparent: on white
    assert first_pixel(Image.new("LA", (40, 40), (0, 0))) == [255, 255, 255]
    palette = Image.new("P", (40, 40), 1)
    palette.putpalette([9, 9, 9, 1, 2, 3])
    assert first_pixel(palette) == [1, 2, 3]
    assert first_pixel(palette, transparency=1) == [255, 255, 255]
    cmyk = first_pixel(Image.new("CMYK", (40, 40), (0, 255, 255, 0)), "JPEG")
    assert np.abs(np.array(cmyk) - (255, 0, 0)).max() <= 2
    assert first_pixel(Image.new("1", (40, 40), 1)) == [255, 255, 255]


def test_a_large_jpeg_decoded_small_is_the_same():
    picture = blocks(1200, 1600, seed=2)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=95)
    bucket = Bucket(192, 256)
    read = read_picture(stream.getvalue(), bucket, (96, 128)).float()
    expected = read_picture(png(picture), bucket, (96, 128)).float()
    assert (read - expected).abs().max() < 4


def test_damaged_pictures_are_named_for_what_they_are():
    whole = png(blocks(300, 300, seed=3))
    with pytest.raises(PictureError, match="not a picture"):
        picture_size(b"not a picture at all")
    assert picture_size(whole[:2000]) == (300, 300)
    with pytest.raises(PictureError, match="truncated"):
        read_picture(whole[:2000], SQUARE, (64, 64))


# Folders


def test_captions_lie_beside_pictures_or_in_metadata(tmp_path):
    picture = png(blocks(64, 64, seed=0))
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("1.png", "2.PNG", "a/3.png", "a/b/4.png", "5.png", "6.png", ".hidden.png", "notes.md"):
        (tmp_path / name).write_bytes(picture)
    (tmp_path / "1.txt").write_text("\ufeff one  \n\n another\n", encoding="utf-8")
    (tmp_path / "2.caption").write_text("a caption")
    (tmp_path / "5.txt").write_text("")
    rows = [{"file_name": "a/3.png", "text": "three"}, {"file_name": "1.png", "caption": ["first", "told"]}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "a" / "b" / "metadata.jsonl").write_text('{"file_name": "4.png", "captions": ["four"]}')
    pictures, skipped = find_pictures(tmp_path, ())
    assert {each.name: each.captions for each in pictures} == {
        "1.png": ("first", "told"), "2.PNG": ("a caption",), "5.png": ("",),
        "a/3.png": ("three",), "a/b/4.png": ("four",),
    }  # fmt: skip
    assert [str(each) for each in skipped] == ["6.png (no caption)"]
    (tmp_path / "metadata.jsonl").unlink()
    pictures, skipped = find_pictures(tmp_path, ())
    assert pictures[0].captions == ("one", "another")
    assert [each.name for each in skipped] == ["6.png", "a/3.png"]


def test_what_cannot_be_trained_on_is_an_error(tmp_path):
    with pytest.raises(CascadeError, match="nowhere does not exist; give a folder of pictures"):
        find_pictures(tmp_path / "nowhere", ())
    with pytest.raises(
        CascadeError,
        match=r"holds no pictures; .jpg, .jpeg, .png, .webp, .bmp, .tif, .tiff, .avif with captions",
    ):
        find_pictures(tmp_path, ())
    (tmp_path / "1.png").write_bytes(png(blocks(64, 64, seed=0)))
    with pytest.raises(CascadeError, match=r"holds 1 picture, but none to train on: 1.png \(no caption\)"):
        find_pictures(tmp_path, ())
    (tmp_path / "1.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(
        CascadeError, match=r"its caption 1.txt cannot be read: it is not in UTF-8; save it so"
    ):
        find_pictures(tmp_path, ())
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "one"}\n{"text": "two"}\n')
    with pytest.raises(CascadeError, match=r"metadata.jsonl, line 2 is not as"):
        find_pictures(tmp_path, ())
    with pytest.raises(CascadeError, match=r"There is no tar .*none.*tar; give webdataset tars"):
        find_pictures(None, (str(tmp_path / "none*.tar"),))


# Tars


def test_a_tar_holds_what_its_folder_holds(tmp_path):
    folder = write_set(tmp_path / "set", captions=2)
    tar = write_tar(tmp_path / "set.tar", folder)
    alone, _ = find_pictures(folder, ())
    packed, skipped = find_pictures(None, (str(tar),))
    assert skipped == []
    assert [each.name for each in packed] == [
        f"set.tar/{each.name}" for each in sorted(alone, key=lambda each: each.name)
    ]
    by_name = {each.name: each for each in alone}
    for each in packed:
        single = by_name[each.name.removeprefix("set.tar/")]
        assert each.captions == single.captions
        assert each.read() == single.read()
        assert each.read(10) == single.read(10)
    assert len({each.identity for each in packed}) == len(packed)


def test_tars_are_found_by_patterns(tmp_path):
    folder = write_set(tmp_path / "set", [(64, 64)])
    for number in range(3):
        write_tar(tmp_path / f"{number:04}.tar", folder)
    assert len(find_pictures(None, (str(tmp_path / "*.tar"),))[0]) == 3
    assert len(find_pictures(None, (str(tmp_path / "{0001..0002}.tar"),))[0]) == 2
    with pytest.raises(CascadeError, match=r"no tar .*0003.tar"):
        find_pictures(None, (str(tmp_path / "{0001..0003}.tar"),))


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def test_tars_are_read_in_place_and_no_link_is_followed(tmp_path):
    picture = png(blocks(64, 64, seed=0))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "../../1.png", picture)
        add(archive, "../../1.txt", b"climbing names are names alone")
        add(archive, "dir/2.jpg", picture)
        add(archive, "dir/2.json", b'{"caption": "from json", "width": 64}')
        link = tarfile.TarInfo("3.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        add(archive, "3.txt", b"a link")
        add(archive, "4.seg.png", picture)
        add(archive, "4.txt", b"another kind of picture")
        add(archive, "5.png", picture)
        add(archive, "5.json", b"[" * 100_000)
        add(archive, "6.png", picture)
    pictures, skipped = find_pictures(None, (str(tmp_path / "a.tar"),))
    assert {each.name: each.captions for each in pictures} == {
        "a.tar/../../1.png": ("climbing names are names alone",),
        "a.tar/dir/2.jpg": ("from json",),
    }
    assert [each.name for each in skipped] == ["a.tar/5.png", "a.tar/6.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar"]


def test_damaged_tars_give_what_is_whole(tmp_path):
    tar = write_tar(tmp_path / "set.tar", write_set(tmp_path / "set", [(64, 64)] * 4))
    data = tar.read_bytes()
    whole, _ = find_pictures(None, (str(tar),))
    tar.write_bytes(data[: whole[-1].offset + 100])
    pictures, skipped = find_pictures(None, (str(tar),))
    assert [each.name for each in pictures] == [each.name for each in whole[:-1]]
    assert "the tar is damaged: " in str(skipped[-1])
    with tarfile.open(tmp_path / "b.tar", "w:gz") as archive:
        archive.add(tmp_path / "set")
    with pytest.raises(CascadeError, match=r"not a tar that can be read in place .* must be unpacked first"):
        find_pictures(None, (str(tmp_path / "b.tar"),))


# Whatever else lies in folders and tars


PICTURE = png(blocks(64, 64, seed=0))


def listed(folder, tars=(), access=None) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """(captions of the pictures by name, reasons of those that are left out by name)"""
    pictures, skipped = find_pictures(folder, tars, access)
    return {each.name: each.captions for each in pictures}, {each.name: each.reason for each in skipped}


def write(folder: Path, **files: bytes | str) -> Path:
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(
            content.encode() if isinstance(content, str) else content
        )
    return folder


@pytest.mark.parametrize("kind", ["BMP", "TIFF", *["AVIF"] * bool(features.check("avif"))])
def test_more_kinds_are_read_where_pillow_reads_them(tmp_path, kind):
    blocks(300, 200, seed=1).save(tmp_path / f"1.{kind.lower()}", kind)
    (tmp_path / "1.txt").write_text("one")
    (picture,), _ = find_pictures(tmp_path, ())
    assert picture_size(picture.read()) == (300, 200)
    read = read_picture(picture.read(), SQUARE, (64, 64)).float()
    assert (read - read_picture(png(blocks(300, 200, seed=1)), SQUARE, (64, 64))).abs().mean() < 3


def test_pictures_of_kinds_that_are_not_read_are_listed(tmp_path):
    names = ("a.heic", "b.JXL", "c.psd", "d.gif", "e.svg")
    for name in names:
        (tmp_path / name).write_bytes(PICTURE)
    write(tmp_path, a__txt="a", notes__md="", film__mp4="", __hidden__heic="")
    tar = write_tar(tmp_path / "set.tar", tmp_path)
    with pytest.raises(
        CascadeError, match=r"holds 5 pictures, but none to train on: .*a.heic \(pictures of kind .heic"
    ):
        find_pictures(tmp_path, ())
    write(tmp_path, x__JPG=PICTURE, x__TXT="upper case")
    for folder, tars, prefix in ((tmp_path, (), ""), (None, (str(write_tar(tar, tmp_path)),), "set.tar/")):
        captions, reasons = listed(folder, tars)
        assert list(captions.values()) == [("upper case",)]
        assert {name.removeprefix(prefix).lower() for name in reasons} == {name.lower() for name in names}
        assert reasons[f"{prefix}a.heic"] == "pictures of kind .heic are not read; save it as PNG or JPEG"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_are_read_in_utf_8_and_in_utf_16_with_a_mark(tmp_path, encoding):
    text = "星 étoile\nsecond"
    row = json.dumps({"file_name": "2.png", "text": "星 étoile"}, ensure_ascii=False)
    write(tmp_path, **{"1__png": PICTURE, "1__txt": text.encode(encoding)})
    write(tmp_path, **{"2__png": PICTURE, "metadata__jsonl": (row + "\n").encode(encoding)})
    tar = write_tar(tmp_path / "set.tar", tmp_path)
    assert listed(tmp_path)[0] == {"1.png": ("星 étoile", "second"), "2.png": ("星 étoile",)}
    assert listed(None, (str(tar),))[0] == {"set.tar/1.png": ("星 étoile", "second")}


BAD_CAPTIONS = {
    "latin": ("café".encode("latin-1"), "it is not in UTF-8; save it so"),
    "shift_jis": ("星".encode("shift_jis"), "it is not in UTF-8; save it so"),
    "utf_16_without_a_mark": ("star".encode("utf-16-le"), "it is not in UTF-8; save it so"),
    "utf_32": ("star".encode("utf-32"), "it is not in UTF-8; save it so"),
    "binary": (b"\xff\xfe\x00", "it is not in UTF-8; save it so"),
    "lines": (b"a\n" * 1001, "it has 1,001 lines, and at most 1,000 are drawn from"),
    "line": (b"a" * 10_001, "it has 10,001 characters, and at most 10,000 are read"),
    "bytes": (b"\n" * 1_000_001, "it has more than 1,000,000 bytes"),
}


@pytest.mark.parametrize("name", BAD_CAPTIONS)
def test_captions_that_cannot_be_read_are_told(tmp_path, name):
    data, reason = BAD_CAPTIONS[name]
    write(tmp_path, good__png=PICTURE, good__txt="good", bad__png=PICTURE, bad__txt=data)
    tar = write_tar(tmp_path / "set.tar", tmp_path)
    assert listed(tmp_path) == (
        {"good.png": ("good",)},
        {"bad.png": f"its caption bad.txt cannot be read: {reason}"},
    )
    assert listed(None, (str(tar),))[1] == {"set.tar/bad.png": f"its caption cannot be read: {reason}"}


def test_a_caption_as_large_as_the_disk_is_not_read(tmp_path):
    write(tmp_path, good__png=PICTURE, good__txt="good", bad__png=PICTURE)
    with (tmp_path / "bad.txt").open("wb") as file:
        file.truncate(5_000_000_000)
    assert listed(tmp_path)[1] == {
        "bad.png": "its caption bad.txt cannot be read: it has more than 1,000,000 bytes"
    }
    with (tmp_path / "metadata.jsonl").open("wb") as file:
        file.truncate(5_000_000_000)
    with pytest.raises(CascadeError, match=r"metadata.jsonl, line 1 has 1,000,000 characters or more"):
        find_pictures(tmp_path, ())


@pytest.mark.parametrize(
    "text", ['"\\ud800"', '["a", "\\udfff"]', '"' + "a" * 20_000 + '"', json.dumps(["a"] * 1001)]
)
def test_a_line_of_metadata_that_no_encoder_takes_is_named(tmp_path, text):
    write(tmp_path, **{"1__png": PICTURE, "metadata__jsonl": f'{{"file_name": "1.png", "text": {text}}}'})
    with pytest.raises(
        CascadeError, match=r"metadata.jsonl, line 1 cannot be trained on: it h.*; mend the line"
    ):
        find_pictures(tmp_path, ())


def test_what_is_not_a_file_is_told_and_never_waited_for(tmp_path):
    write(tmp_path, good__png=PICTURE, good__txt="good", bad__png=PICTURE, gone__txt="gone", loop__txt="loop")
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "bad.txt")
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "folder.png").mkdir()
    pipe = "it is a pipe or a device, not a file"
    captions, reasons = listed(tmp_path)
    assert captions == {"good.png": ("good",)}
    assert reasons.pop("loop.png").startswith("it cannot be read: ")
    assert reasons == {
        "pipe.png": f"it cannot be read: {pipe}",
        "bad.png": f"its caption bad.txt cannot be read: {pipe}",
        "gone.png": "it cannot be read: No such file or directory",
    }
    os.mkfifo(tmp_path / "set.tar")
    with pytest.raises(CascadeError, match=r"set.tar cannot be read \(it is a pipe or a device"):
        find_pictures(None, (str(tmp_path / "set.tar"),))
    os.mkfifo(tmp_path / "metadata.jsonl")
    with pytest.raises(CascadeError, match=r"metadata.jsonl cannot be read .*a pipe or a device"):
        find_pictures(tmp_path, ())


def test_odd_names_are_names_and_are_told_escaped(tmp_path):
    odd = ["new\nline", "\x1b[31mred", os.fsdecode(b"\xff\xfe"), "x" * 200, "a.b c'\"d"]
    for name in odd:
        (tmp_path / f"{name}.png").write_bytes(PICTURE)
        (tmp_path / f"{name}.txt").write_text(name[:3] if name.isprintable() else "odd")
        (tmp_path / f"{name} .png").write_bytes(PICTURE)
        (tmp_path / f"{name}.prompt0.png").write_bytes(PICTURE)
    pictures, skipped = find_pictures(tmp_path, ())
    assert {each.name for each in pictures} == {f"{name}.png" for name in odd}
    assert all(len(each.image_prompts) == 1 for each in pictures)
    assert len(skipped) == 5
    assert all(str(each).isprintable() for each in skipped)
    bucketed, _ = assign_buckets(pictures, DataSettings(folder=".", size=256), Cache(None, ""))
    assert len({each.key(False) for each in bucketed}) == 5
    write_left_out(tmp_path / "left_out.txt", skipped)
    assert len((tmp_path / "left_out.txt").read_text(encoding="utf-8").splitlines()) == 5
    write_left_out(tmp_path / "left_out.txt", [])
    assert not (tmp_path / "left_out.txt").exists()


def test_links_are_followed_but_not_in_circles(tmp_path):
    write(tmp_path, **{"1__png": PICTURE, "1__txt": "one"})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder = tmp_path / "set"
    (folder / "a").mkdir(parents=True)
    (folder / "b").symlink_to(elsewhere)
    (folder / "a" / "up").symlink_to("..")
    (elsewhere / "back").symlink_to(folder)
    (folder / "a" / "link.png").symlink_to(tmp_path / "1.png")
    (folder / "a" / "link.txt").symlink_to(tmp_path / "1.txt")
    write(elsewhere, **{"2__png": PICTURE, "2__txt": "two"})
    captions, reasons = listed(folder)
    assert captions == {"a/link.png": ("one",), "b/2.png": ("two",)}
    assert reasons == {"a/up": "a link to a folder above it", "b/back": "a link to a folder above it"}


def test_a_folder_deeper_than_python_recurses_is_listed(tmp_path):
    place = tmp_path.joinpath(*["d"] * 400)
    place.mkdir(parents=True)
    write(place, **{"1__png": PICTURE, "1__txt": "one"})
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(300)
    try:
        captions, _ = listed(tmp_path)
    finally:
        sys.setrecursionlimit(before)
    assert captions == {"d/" * 400 + "1.png": ("one",)}


def test_a_whole_disk_is_not_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(access_module, "MAX_NAMES", 50)
    write_set(tmp_path / "set", [(64, 64)] * 26)
    tar = write_tar(tmp_path / "set.tar", tmp_path / "set")
    for folder, tars in (
        (tmp_path / "set", ()),
        (None, (str(tar),)),
        (None, (str(tmp_path / "set/*/*.tar"),)),
    ):
        with pytest.raises(CascadeError, match=r"more than 50 files, as .* was listed; give a folder"):
            find_pictures(folder, tars)


def test_every_file_asks_whether_to_stop(tmp_path):
    write_set(tmp_path / "set", [(64, 64)] * 4)
    tar = write_tar(tmp_path / "set.tar", tmp_path / "set")

    def stops_at(call: int) -> Access:
        calls = itertools.count(1)
        return Access(lambda: next(calls) == call)

    for folder, tars in ((tmp_path / "set", ()), (None, (str(tar),)), (None, (str(tmp_path / "se[t].ta*"),))):
        for call in (1, 5, 11):
            with pytest.raises(Interrupted):
                find_pictures(folder, tars, stops_at(call))
    pictures, _ = find_pictures(tmp_path / "set", ())
    with pytest.raises(Interrupted):
        assign_buckets(pictures, DataSettings(folder=".", size=256), Cache(None, ""), stops_at(3).ask)
    began = threading.Event()
    with pytest.raises(Interrupted):  # also while one file takes long
        list(map_in_threads(lambda _: began.wait(60), [1], 1, stops_at(3).ask))
    began.set()


def test_a_host_says_which_folders_may_be_read(tmp_path):
    folder, secret = tmp_path / "input" / "set", tmp_path / "secret"
    for place in (folder, secret):
        write_set(place, [(64, 64)])
    (folder / "link.png").symlink_to(secret / "000.png")
    (folder / "own.png").symlink_to(folder / "000.png")
    write(folder, link__txt="a link", own__txt="its own", stolen__png=PICTURE)
    (folder / "stolen.txt").symlink_to(secret / "000.txt")
    (folder / "out").symlink_to(secret)

    def check(path: Path) -> None:
        if not path.is_relative_to(tmp_path / "input"):
            raise CascadeError(f"{path} is outside")

    leads_out = "a link that leads out of the folders that may be read"
    captions, reasons = listed(folder, (), Access(check=check))
    assert captions.keys() == {"000.png", "own.png"}
    assert reasons == {
        "link.png": f"it cannot be read: {leads_out}",
        "stolen.png": f"its caption stolen.txt cannot be read: {leads_out}",
        "out": leads_out,
    }
    (folder / "metadata.jsonl").symlink_to(secret / "000.txt")
    tar = write_tar(tmp_path / "secret.tar", secret)
    (tmp_path / "input" / "link.tar").symlink_to(tar)
    for place, tars in ((folder, ()), (secret, ()), (folder / "out", ()), (None, (str(tar),))):
        with pytest.raises(CascadeError, match=r"outside|leads out"):
            find_pictures(place, tars, Access(check=check))
    with pytest.raises(CascadeError, match=r"secret.tar is outside"):
        find_pictures(None, (str(tmp_path / "inp*/link.tar"),), Access(check=check))


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("{000000..999999999}.tar", "more than 100,000 files"),
        ("{0..9}" * 20 + ".tar", "more than 100,000 files"),
        ("{0.." + "9" * 10_000 + "}.tar", "more than 100,000 files"),
        ("{5..2}.tar", "count from 5 to 2; give the smaller number first"),
        ("{0..0}" * 2000, "There is no tar"),
        ("a\0.tar", "There is no tar"),
        ("~nobody-here/*.tar", "There is no tar"),
        ("x" * 5000, "There is no tar"),
    ],
)
def test_patterns_of_tars_are_counted_before_they_are_expanded(pattern, sentence):
    with pytest.raises(CascadeError, match=sentence) as caught:
        find_pictures(None, (pattern,))
    assert len(str(caught.value)) < 500


def test_patterns_match_as_glob_does(tmp_path, monkeypatch):
    for name in ("a/1.tar", "a/2.tar", "b/1.tar", "b/.3.tar", "[c]/1.tar", "01-a.tar", "02-a.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / name, tmp_path / "nothing")
    monkeypatch.chdir(tmp_path)
    for pattern in ("*/*.tar", "*/[12].tar", "a/?.tar", "*.tar", "b/.*.tar", "./*/1.tar", "[[]c]/*.tar"):
        for rooted in (pattern, str(tmp_path / pattern)):
            assert expand([rooted], Access()) == sorted(map(Path, glob.glob(rooted)))
    assert expand(["[c]/1.tar", "{01..02}-a.tar"], Access()) == [
        Path("[c]/1.tar"), Path("01-a.tar"), Path("02-a.tar"),
    ]  # fmt: skip


def hostile_tar(path: Path, *headers: tarfile.TarInfo) -> str:
    """A tar of one good picture, then of these headers, which promise what does not follow."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        add(archive, "good.png", PICTURE)
        add(archive, "good.txt", b"good")
        for header in headers:
            assert archive.fileobj is not None
            archive.fileobj.write(header.tobuf(tarfile.GNU_FORMAT))
    return str(path)


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info


@pytest.mark.parametrize("size", [10**6, 10**15, 2**80, -512, -(2**40)])
@pytest.mark.parametrize(
    "kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE, b"Z"]
)
def test_headers_of_tars_are_not_taken_at_their_word(tmp_path, size, kind):
    captions, _ = listed(None, (hostile_tar(tmp_path / "a.tar", header("bad.png", size, kind)),))
    assert captions == {"a.tar/good.png": ("good",)}


def test_a_long_name_as_large_as_the_disk_is_not_read(tmp_path):
    path = Path(hostile_tar(tmp_path / "a.tar", header("bad.png", 5_000_000_000, tarfile.GNUTYPE_LONGNAME)))
    with path.open("rb+") as file:
        file.truncate(6_000_000_000)
    captions, reasons = listed(None, (str(path),))
    assert captions == {"a.tar/good.png": ("good",)}
    assert reasons == {"a.tar": "the tar is damaged: a header of 5,000,000,000 bytes"}


def test_a_thousand_names_in_a_row_are_a_sentence(tmp_path):
    path = hostile_tar(tmp_path / "a.tar", *[header("x", 0, tarfile.GNUTYPE_LONGNAME)] * 3000)
    assert listed(None, (path,))[0] == {"a.tar/good.png": ("good",)}


def test_digits_that_tarfile_would_search_for_hours_are_a_sentence(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        add(archive, "good.png", PICTURE)
        add(archive, "good.txt", b"good")
        archive.addfile(header("x", 60_000, tarfile.XHDTYPE), io.BytesIO(b"1" * 60_000))
        add(archive, "next.png", PICTURE)
    captions, reasons = listed(None, (str(path),))
    assert captions == {"a.tar/good.png": ("good",)}
    assert reasons == {"a.tar": "the tar is damaged: a header of digits"}


def test_devices_and_links_in_tars_are_passed_over(tmp_path):
    kinds = (
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.DIRTYPE,
    )
    path = hostile_tar(tmp_path / "a.tar", *(header(f"{kind.decode()}.png", 0, kind) for kind in kinds))
    assert listed(None, (path,)) == ({"a.tar/good.png": ("good",)}, {})
