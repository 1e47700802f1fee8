"""Bad files for LoadImage, and small ones that would cost much memory or time: refused in a sentence beforehand."""

import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.headless import run_graph
from cascade_nodes.tests.headless.record_comfyui import node


def encoded(picture, format="PNG", **options):
    stream = io.BytesIO()
    picture.save(stream, format=format, **options)
    return stream.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 32, 3), dtype=np.uint8))
PNG = encoded(NOISE)


def png_of(width, height):
    """A small PNG that states any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return PNG[:16] + header + checksum + PNG[33:]


def gif_of(width, height):
    return b"GIF89a" + struct.pack("<HH", width, height) + encoded(Image.new("P", (1, 1)), "GIF")[10:]


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Runs a graph of LoadImage and PreviewImage in a folder of its own; gives the picture that was shown."""
    monkeypatch.chdir(tmp_path)

    def run(name):
        graph = {"1": node("LoadImage", image=name), "2": node("PreviewImage", images=["1", 0])}
        return Image.open(run_graph(graph).pictures[0].path)

    return run


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not a picture"),
        (b"hello", "is not a picture"),
        (PNG[:8], "is not a picture"),
        (PNG[:30], "is not a picture|cannot be read"),
        (PNG[:-100], "cannot be read: image file is truncated"),
        (png_of(0, 0), "is not a picture|has no pixels|cannot be read"),
        (png_of(9_000, 9_000), "states 9,000 × 9,000 pixels"),
        (png_of(2**31 - 1, 2**31 - 1), "cannot be read"),
        (gif_of(65_535, 65_535), "cannot be read: .* pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a picture"),
        (b"\x1b[2J\x00", "is not a picture"),
    ],
    ids=range(11),
)
def test_what_is_not_a_picture(content, words, load, tmp_path):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(CascadeError, match=words) as caught:
        load("a.png")
    assert str(caught.value).startswith("Node 1 (LoadImage): ")
    assert "failed with" not in str(caught.value)


def test_what_is_not_a_file(load, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dead").symlink_to("nowhere")
    for name in (
        "pipe",
        "folder",
        "dead",
        "/dev/zero",
        "",
        "\0",
        "x" * 5000,
        "\udce9",
        "/" * 5000,
        "\x1b[2J",
        "a\nb",
        "..",
        ".",
    ):
        with pytest.raises(CascadeError) as caught:
            load(name)
        message = str(caught.value)
        assert message.startswith("Node 1 (LoadImage): input 'image': There is no picture ")
        assert len(message) < 1200
        assert message.isprintable()
    for name in (3, None, {"a": 1}, ["x"], {"__value__": ["a"]}, True):
        with pytest.raises(CascadeError, match="Node 1 \\(LoadImage\\): input 'image'"):
            load(name)


def test_many_frames_of_an_animation_are_bounded_together(load, tmp_path):
    """A file of kilobytes with 75 million pixels."""
    frames = [Image.new("1", (2048, 2048), index % 2) for index in range(18)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=1)
    (tmp_path / "a.gif").write_bytes(content)
    with pytest.raises(CascadeError, match="its frames are more than 4,096 or have together more than"):
        load("a.gif")


@pytest.mark.parametrize(
    ("picture", "format", "options"),
    [
        (NOISE, "PNG", {}),
        (NOISE.convert("CMYK"), "JPEG", {}),
        (NOISE.convert("L"), "BMP", {}),
        (NOISE.convert("1"), "TIFF", {}),
        (Image.fromarray(np.arange(48 * 32, dtype=np.uint16).reshape(48, 32)), "PNG", {}),
        (NOISE.convert("P"), "GIF", {}),
        (NOISE.convert("LA"), "PNG", {}),
        (NOISE, "WEBP", {"save_all": True, "append_images": [NOISE.rotate(90).resize(NOISE.size)]}),
        (NOISE, "PNG", {"save_all": True, "append_images": [NOISE.convert("RGBA")]}),
    ],
    ids=range(9),
)  # fmt: skip
def test_odd_pictures_that_are_read(picture, format, options, load, tmp_path):
    (tmp_path / "a").write_bytes(encoded(picture, format, **options))
    assert load("a").size == (32, 48)


def test_a_name_with_the_separator_of_windows(load, tmp_path):
    """Graphs that were saved on Windows have such names."""
    (tmp_path / "input" / "sub").mkdir(parents=True)
    NOISE.save(tmp_path / "input" / "sub" / "in.png")
    NOISE.rotate(180).save(tmp_path / "input" / "sub\\in.png")
    assert np.array_equal(np.asarray(load("sub/in.png")), np.asarray(NOISE))
    assert np.array_equal(np.asarray(load("sub\\in.png")), np.asarray(NOISE.rotate(180))), (
        "as it is written, first"
    )
    (tmp_path / "input" / "sub\\in.png").unlink()
    assert np.array_equal(np.asarray(load("sub\\in.png")), np.asarray(NOISE))
    assert np.array_equal(np.asarray(load("sub\\in.png [input]")), np.asarray(NOISE))


def test_a_picture_of_many_nodes_is_read_once_for_its_fingerprint(tmp_path, monkeypatch, load):
    NOISE.save(tmp_path / "a.png")
    graph = {str(i): node("LoadImage", image="a.png") for i in range(50)}
    graph |= {f"show {i}": node("PreviewImage", images=[str(i), 0]) for i in range(50)}
    opened = []
    read = "cascade_nodes.headless.builtin.pictures.open_regular"
    from cascade_nodes.cascade_core.reading import open_regular

    monkeypatch.setattr(read, lambda path: opened.append(path) or open_regular(path))
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    run_graph(tmp_path / "graph.json")
    assert len(opened) == 1
