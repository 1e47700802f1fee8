"""Training pictures: buckets, crops, orientation, kinds of files; folders and tars; what is wrong is named."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.geometry import STAGE_C_COMPRESSION
from cascade_nodes.cascade_core.training.data.buckets import Bucket, buckets, nearest
from cascade_nodes.cascade_core.training.data.pictures import (
    ORIENTATION,
    PictureError,
    picture_size,
    read_picture,
)
from cascade_nodes.cascade_core.training.data.sources import find_pictures
from cascade_nodes.nodes.sizes import compression_input, empty_stage_c
from cascade_nodes.tests.core.training_sets import blocks, png, write_set, write_tar

SQUARE = Bucket(256, 256)


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
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
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
    stored.save(stream, kind, exif=exif, **({"quality": 98} if kind != "PNG" else {}))
    assert picture_size(stream.getvalue()) == (120, 260)
    bucket = Bucket(192, 320)
    read = read_picture(stream.getvalue(), bucket, bucket.compressor).float()
    expected = read_picture(png(upright), bucket, bucket.compressor).float()
    assert (read - expected).abs().mean() < (0.01 if kind == "PNG" else 3)
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
    with pytest.raises(PictureError, match="no picture"):
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
    with pytest.raises(CascadeError, match=r"holds no pictures; .jpg, .jpeg, .png, .webp with captions"):
        find_pictures(tmp_path, ())
    (tmp_path / "1.png").write_bytes(png(blocks(64, 64, seed=0)))
    with pytest.raises(
        CascadeError, match=r"holds 1 pictures, but none to train on, such as 1.png \(no caption\)"
    ):
        find_pictures(tmp_path, ())
    (tmp_path / "1.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CascadeError, match="its caption cannot be read"):
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
    with pytest.raises(CascadeError, match=r"no tar that can be read in place .* must be unpacked first"):
        find_pictures(None, (str(tmp_path / "b.tar"),))
