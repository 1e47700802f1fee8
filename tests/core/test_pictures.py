"""Opening pictures: kinds, orientation, depth; what a small file may cost; what is not a file never blocks."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo

from cascade_nodes.cascade_core.errors import CascadeError, Interrupted
from cascade_nodes.cascade_core.pictures import (
    FREE_PIXELS,
    MAX_FRAMES,
    PictureError,
    as_image,
    open_picture,
    read_frames,
    upright,
)
from cascade_nodes.headless.pictures import read_image

COLOURS = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8))
LOSSLESS = ["PNG", "BMP", "TIFF"]
AVIF = ["AVIF"] if features.check("avif") else []


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def blank_png(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG of one bit a pixel that states this size, and holds no pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def blank_gif(width: int, height: int, frames: int = 1) -> bytes:
    """A GIF whose frames are one pixel each, on a canvas of this size."""
    header = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(3) + b"\xff" * 3
    frame = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return header + frame * frames + b";"


def refusal(source) -> PictureError:
    with pytest.raises(PictureError) as caught, open_picture(source) as picture:
        upright(picture)
    return caught.value


@pytest.mark.parametrize("kind", LOSSLESS)
def test_kinds_without_loss_are_read_as_they_are(tmp_path, kind):
    path = tmp_path / "picture"  # the name's ending says nothing
    path.write_bytes(encoded(COLOURS, kind))
    with open_picture(path) as picture:
        assert upright(picture).tobytes() == COLOURS.tobytes()
    assert (as_image(path)[0] * 255).round().byte().numpy().tobytes() == COLOURS.tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", *AVIF])
def test_other_kinds_are_read_from_bytes(kind):
    with open_picture(encoded(COLOURS, kind)) as picture:
        assert upright(picture).size == (6, 4)


@pytest.mark.parametrize(("kind", "name"), [("EPS", "EPS"), ("ICO", "ICO"), ("PDF", "PDF"), ("TGA", "TGA")])
def test_kinds_that_are_not_safe_are_not_pictures(kind, name):
    error = refusal(encoded(COLOURS, kind))
    assert (str(error), error.reason) == (
        "in memory is not a picture; PNG, JPEG or WebP was expected.",
        "not a picture",
    )


def test_pixels_are_as_pillow_has_them():
    """Palettes, transparency, 1, 16 and 32 bits, CMYK: the front door and LoadImage read the same."""
    grey = Image.fromarray(np.arange(24, dtype=np.uint16).reshape(4, 6) * 2849)
    pictures = [COLOURS.convert(mode) for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "I", "F")]
    for picture in [*pictures, grey]:
        data = encoded(picture, "TIFF")
        with open_picture(data) as opened:
            read = upright(opened)
            if picture.mode.startswith("I"):
                assert read.mode == "L"
                assert read.tobytes() == (np.asarray(picture) // 257).astype(np.uint8).tobytes()
            else:
                assert (read.mode, read.tobytes()) == (picture.mode, picture.tobytes())


def test_exif_turns_a_picture_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "turned.png").write_bytes(encoded(COLOURS, "PNG", exif=exif))
    expected = np.asarray(COLOURS.transpose(Image.Transpose.ROTATE_270), dtype=np.float32) / 255
    assert as_image(tmp_path / "turned.png")[0].numpy().tobytes() == expected.tobytes()
    assert read_image(tmp_path / "turned.png")[0][0].numpy().tobytes() == expected.tobytes()
    (frame,) = read_frames(tmp_path / "turned.png")
    assert frame.size == (4, 6)


@pytest.mark.parametrize("make", [blank_png, blank_gif])
def test_more_pixels_than_a_small_file_may_state_are_refused_before_they_are_decoded(make):
    error = refusal(make(12_000, 12_000))
    assert "it states 12,000 × 12,000 pixels, and of a file of " in error.reason
    assert error.reason.endswith("are read; make it smaller")
    assert refusal(make(65_000, 65_000)).reason  # Pillow's own refusal, or ours
    with open_picture(make(8192, 8192)) as picture:
        assert picture.width * picture.height == FREE_PIXELS


def test_a_larger_file_may_have_more_pixels():
    filler = chunk(b"fiLl", bytes(1_000_000))
    with open_picture(blank_png(11_000, 11_000, filler)) as picture:  # 121 million
        assert picture.size == (11_000, 11_000)
    refusal(blank_png(12_000, 12_000, filler * 3))


def test_frames_are_counted_together():
    assert len(read_frames(blank_gif(2, 2, 3))) == 3
    assert len(read_frames(blank_gif(2, 2, MAX_FRAMES))) == MAX_FRAMES
    for many in (blank_gif(2, 2, MAX_FRAMES + 1), blank_gif(8192, 8192, 2)):
        with pytest.raises(PictureError, match="make them smaller or fewer"):
            read_frames(many)
        with open_picture(many) as picture:  # one frame is asked for: the others cost nothing
            assert picture.size in ((2, 2), (8192, 8192))


def test_frames_are_those_of_the_first_ones_size(tmp_path):
    pages = [COLOURS, COLOURS.resize((3, 2)), COLOURS]
    COLOURS.save(tmp_path / "pages.tiff", save_all=True, append_images=pages[1:])
    assert [frame.size for frame in read_frames(tmp_path / "pages.tiff")] == [(6, 4)] * 2


def test_texts_and_profiles_are_bounded():
    bomb = zlib.compress(bytes(50_000_000))
    assert "too large" in refusal(blank_png(4, 4, chunk(b"zTXt", b"a\0\0" + bomb))).reason
    assert "too large" in refusal(blank_png(4, 4, chunk(b"iCCP", b"a\0\0" + bomb))).reason
    texts = PngInfo()
    texts.add_text("prompt", "x" * 500_000, zip=True)
    with open_picture(encoded(COLOURS, "PNG", pnginfo=texts)) as picture:
        assert upright(picture).size == (6, 4)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", *AVIF])
def test_a_file_that_ends_early_is_refused_wherever_it_is_cut(kind):
    whole = encoded(COLOURS.resize((60, 40)), kind)
    for length in (0, 1, len(whole) // 3, len(whole) // 2):
        refusal(whole[:length])


def test_what_is_not_a_file_is_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    for path in (tmp_path / "pipe.png", str(tmp_path / "link.png"), "/dev/zero"):
        assert refusal(path).reason == "it is a pipe or a device, not a file"
    assert refusal(tmp_path).reason == "it is a folder"
    assert "cannot be read: No such file" in str(refusal(tmp_path / "nothing.png"))
    assert refusal(tmp_path / "loop.png").reason
    for name in ("a\0.png", "\ud800.png", "\x1b[31m\n.png", "x" * 5000 + ".png"):
        error = refusal(tmp_path / name)
        assert error.reason
        assert str(error).isprintable()
        assert len(str(error)) < 700


def test_a_file_of_too_many_bytes_is_not_read(tmp_path):
    with (tmp_path / "huge.webp").open("wb") as file:
        file.write(encoded(COLOURS, "WEBP"))
        file.truncate(2**30 + 1)  # a hole: the disk holds none of it
    assert "at most 1,073,741,824 are read" in refusal(tmp_path / "huge.webp").reason


def test_what_ends_a_run_is_not_taken_for_a_fault_of_the_picture():
    for error in (Interrupted, KeyboardInterrupt, CascadeError):
        with pytest.raises(error), open_picture(encoded(COLOURS, "PNG")):
            raise error


def test_the_front_door_refuses_alike(tmp_path):
    (tmp_path / "bomb.png").write_bytes(blank_png(12_000, 12_000))
    with pytest.raises(CascadeError, match=r"bomb\.png cannot be read: it states 12,000"):
        as_image(tmp_path / "bomb.png")
    values = as_image([COLOURS, COLOURS])
    assert torch.equal(values[0], torch.from_numpy(np.asarray(COLOURS, dtype=np.float32) / 255))


def tiled_tiff(side: int, tile: int) -> bytes:
    """A TIFF of side² grey pixels that states one tile of tile² pixels, and holds few of them."""
    data = zlib.compress(bytes(1000))
    tags = [
        (256, side),
        (257, side),
        (258, 8),
        (259, 8),
        (262, 1),
        (277, 1),
        (322, tile),
        (323, tile),
        (324, 200),
    ]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in [*tags, (325, len(data))])
    return (b"II*\0" + struct.pack("<IH", 8, len(tags) + 1) + entries + bytes(4)).ljust(200, b"\0") + data


def test_a_tile_larger_than_pictures_may_be_is_refused():
    reason = refusal(tiled_tiff(64, 40_000)).reason
    assert reason.startswith(
        "it states 64 × 64 pixels in a tile of 1,600,000,000, and of a file of 217 bytes at most"
    )
    assert "pixels" not in refusal(tiled_tiff(64, 64)).reason


def test_scans_of_a_jpeg_are_counted(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "\xff\xda" * 1000  # in another segment they are not scans
    whole = encoded(COLOURS, "JPEG", progressive=True, exif=exif, comment=b"\xff\xda" * 1000)
    last = whole.rfind(b"\xff\xda")
    many = whole[:last] + whole[last:-2] * 100 + whole[-2:]
    assert refusal(many).reason == "its pixels are refined more than 64 times; save it anew"
    (tmp_path / "motion.jpg").write_bytes(whole + b"\xff\xda" * 1000)  # a film behind the picture
    with open_picture(tmp_path / "motion.jpg") as picture:
        assert upright(picture).size == (6, 4)
