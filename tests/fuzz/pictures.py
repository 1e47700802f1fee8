"""Mutated pictures and odd names through LoadImage, LoadImageMask, training folders, tars and the front door."""

from __future__ import annotations

import io
import os
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from PIL import Image

from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.cascade_core.pictures import as_image, as_mask
from cascade_nodes.cascade_core.training.data.batches import TrainingData
from cascade_nodes.cascade_core.training.settings import DataSettings
from cascade_nodes.headless.run import run_graph
from cascade_nodes.tests.core.training_sets import MeanColours
from cascade_nodes.tests.fuzz.values import TEXTS, odd_text
from cascade_nodes.tests.headless.record_comfyui import node

FORMATS = {
    "PNG": ".png",
    "JPEG": ".jpg",
    "GIF": ".gif",
    "WEBP": ".webp",
    "BMP": ".bmp",
    "TIFF": ".tif",
    "ICO": ".ico",
    "PPM": ".ppm",
    "TGA": ".tga",
}
MODES = ("RGB", "RGBA", "L", "P", "1", "LA", "CMYK", "I;16", "I", "F", "HSV", "YCbCr", "LAB", "PA")
NAMES = (
    "a b",
    "ä",
    "a.prompt0",
    "a.b.c",
    "A",
    ".hidden",
    "._a",
    "a\nb",
    "a\x1b[31m",
    "x" * 240,
    "ü" * 120,
    "-rf",
    "%s",
    "{0..9}",
    "*",
    "a [output]",
    "caf\udce9",
    "con",
    "'",
    "\u202ea",
)
CAPTIONS = (
    b"a red star", b"", b"\xef\xbb\xbfa\r\nb", "caf\u00e9".encode("cp1252"), "a star".encode("utf-16"), b"\0",
        b"\x1b[31m", b"a\n" * 100_000, b"a " * 600_000,
    b"(" * 5000, b"[", b"{}", b"\xff" * 100, "\u202e".encode(),
)  # fmt: skip
SIDES = (0, 1, 7, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 20_000)


class World:
    def __init__(self, folder: Path):
        self.folder = folder
        torch.set_num_threads(1)
        (folder / "good").mkdir()
        Image.radial_gradient("L").resize((64, 80)).convert("RGB").save(folder / "good" / "good.png")
        (folder / "good" / "good.txt").write_text("a red star")

    def attempt(self, random: Random) -> None:
        place = self.folder / "case"
        place.mkdir()
        try:
            random.choice((self.graph, self.graph, self.training, self.training, self.tar, self.door))(
                random, place
            )
        finally:
            shutil.rmtree(place)
            shutil.rmtree(self.folder / "output", ignore_errors=True)

    def picture(self, random: Random, place: Path) -> Path:
        """A spoiled picture under a name that may be odd."""
        kind = random.choice(list(FORMATS))
        data = random.choice((spoiled, spoiled, spoiled, bomb))(kind, random)
        name = random.choice(NAMES) if random.random() < 0.3 else "a"
        suffix = random.choice(list(FORMATS.values())) if random.random() < 0.1 else FORMATS[kind]
        path = place / (name + (suffix.upper() if random.random() < 0.1 else suffix))
        try:
            path.write_bytes(data)
        except (OSError, ValueError):  # a name that this system does not take
            path = place / f"a{suffix}"
            path.write_bytes(data)
        return path

    def graph(self, random: Random, place: Path) -> None:
        path = self.picture(random, place)
        name = random.choice(
            (
                str(path.relative_to(self.folder)),
                str(path.relative_to(self.folder)),
                path.name,
                odd_text(random),
            )
        )
        graph = {
            "1": node("LoadImage", image=name),
            "2": node("SaveImage", images=["1", 0], filename_prefix="seen"),
        }
        if random.random() < 0.3:
            mask = node("LoadImageMask", image=name, channel=random.choice(("alpha", "red", "green", "blue")))
            graph |= {
                "1": mask,
                "2": node("LoadImage", image="good/good.png"),
                "3": node(
                    "CascadeInpaintComposite", image=["2", 0], source=["2", 0], mask=["1", 0], feather=1
                ),
            }
            graph["4"] = node("SaveImage", images=["3", 0], filename_prefix="seen")
        for picture in run_graph(graph).pictures:
            with Image.open(picture.path) as saved:
                saved.load()

    def training(self, random: Random, place: Path) -> None:
        """A folder with a good picture and bad ones, which are left out with a reason, or used."""
        shutil.copytree(self.folder / "good", place / "good")
        for _ in range(random.choice((1, 2, 5))):
            path = self.picture(random, place)
            caption = path.with_suffix(random.choice((".txt", ".txt", ".caption", ".TXT", ".json")))
            caption.write_bytes(random.choice(CAPTIONS) if random.random() < 0.7 else b"a blue star")
        odd = random.random()
        if odd < 0.1:
            os.mkfifo(place / random.choice(("f.png", "f.txt", "metadata.jsonl", "good/good.caption")))
        elif odd < 0.2:
            (place / random.choice(("loop", "loop.png", "loop.txt"))).symlink_to(
                random.choice((place, place / "loop.png", Path("/dev/zero")))
            )
        elif odd < 0.3:
            lines = ('{"file_name": "a.png", "text": "x"}', '{"file_name": 1}',
                '{"file_name": "../good/good.png", "text": ["a", "b"]}', "[" * 100_000, "null",
                     '{"file_name": "a\\u0000b", "text": "x"}', '{"file_name": "' + "a/" * 9000 + '"}',
                     '{"file_name": "\\ud800.png", "text": "\\ud800"}')  # fmt: skip
            (place / "metadata.jsonl").write_text("\n".join(random.sample(lines, 2)))
        self.open(random, folder=str(place), cache=str(place / "cache") if random.random() < 0.5 else None)

    def tar(self, random: Random, place: Path) -> None:
        path = place / "set.tar"
        with tarfile.open(path, "w") as archive:
            archive.add(self.folder / "good" / "good.png", "0.png")
            archive.add(self.folder / "good" / "good.txt", "0.txt")
            for number in range(random.choice((1, 2))):
                entry = tarfile.TarInfo(
                    random.choice(
                        (
                            f"{number}.png",
                            "../x.png",
                            "/etc/x.jpg",
                            "a\nb.png",
                            "x" * 300 + ".png",
                            "1.prompt0.png",
                        )
                    )
                )
                data = spoiled("PNG", random)
                entry.size = len(data)
                entry.type = random.choice(
                    (
                        tarfile.REGTYPE,
                        tarfile.REGTYPE,
                        tarfile.SYMTYPE,
                        tarfile.LNKTYPE,
                        tarfile.FIFOTYPE,
                        tarfile.CHRTYPE,
                    )
                )
                entry.linkname = "/etc/passwd"
                archive.addfile(entry, io.BytesIO(data))
                caption = tarfile.TarInfo(entry.name.rsplit(".", 1)[0] + random.choice((".txt", ".json")))
                words = random.choice(CAPTIONS)
                caption.size = len(words)
                archive.addfile(caption, io.BytesIO(words))
        if random.random() < 0.5:
            raw = bytearray(path.read_bytes())
            for _ in range(random.choice((1, 5))):
                raw[random.randrange(min(len(raw), 4096))] = random.randrange(256)
            path.write_bytes(raw[: random.choice((len(raw), len(raw) // 2, 700))])
        pattern = random.choice(
            (
                str(path),
                str(path),
                str(place / "*.tar"),
                str(place / "{0..99999999}.tar"),
                str(place / "{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}.tar"),
                odd_text(random),
            )
        )
        self.open(random, tars=(pattern,))

    def open(self, random: Random, **settings) -> None:
        data = TrainingData(
            DataSettings(size=64, flip=random.random() < 0.3, **settings),
            MeanColours(),
            "mean",
            with_images=random.random() < 0.5,
        )
        assert data.summary()
        for step in range(2):
            data.batch(step, 2)

    def door(self, random: Random, place: Path) -> None:
        path = self.picture(random, place)
        given = random.choice((path, path, str(path), place, place / "gone.png", random.choice(TEXTS)))
        values = random.choice((as_image, as_mask))(given)
        if not torch.isfinite(values).all():
            raise AssertionError("values that are not finite")


def encoded(kind: str, random: Random) -> bytes:
    """A good picture, at times with transparency, frames, EXIF or other modes."""
    picture = (
        Image.radial_gradient("L")
        .resize((random.choice((1, 16, 70)), random.choice((1, 24, 64))))
        .convert("RGB")
    )
    mode = random.choice(MODES) if random.random() < 0.5 else "RGB"
    options = {}
    if random.random() < 0.2 and kind in ("GIF", "PNG", "WEBP", "TIFF"):
        options = {"save_all": True, "append_images": [picture.rotate(90), picture.resize((8, 8))]}
    if random.random() < 0.2 and kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        exif = Image.Exif()
        exif[0x0112] = random.choice((0, 3, 6, 8, 9, 65535))
        options["exif"] = exif
    stream = io.BytesIO()
    try:
        picture.convert(mode).save(stream, kind, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SystemError):  # not in this mode
        stream = io.BytesIO()
        picture.save(stream, kind)
    return stream.getvalue()


def spoiled(kind: str, random: Random) -> bytes:
    data = bytearray(encoded(kind, random))
    way = random.random()
    if way < 0.15:
        return bytes(data)
    if way < 0.35:
        return bytes(data[: random.randrange(len(data))])
    early = random.random() < 0.6
    for _ in range(random.choice((1, 1, 4, 20))):
        data[random.randrange(min(len(data), 120) if early else len(data))] = random.randrange(256)
    if kind == "PNG" and random.random() < 0.5:
        return with_checksums(bytes(data))
    return bytes(data)


def with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks have the checksums of what is in them now, so that more of it is read."""
    out, place = data[:8], 8
    while place + 12 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        body = data[place + 4 : place + 8 + length]
        out += data[place : place + 8 + length] + struct.pack(">I", zlib.crc32(body))
        place += 12 + length
    return out


def bomb(kind: str, random: Random) -> bytes:
    """A small file that says that it is large."""
    side, other = random.choice(SIDES), random.choice(SIDES)
    if random.random() < 0.4:  # as large as Pillow allows
        side, other = random.choice(((13_000, 13_000), (1, 170_000_000), (40_000, 4_000), (65_000, 2_000)))
    data = bytearray(encoded(kind, random))
    writers: dict[str, Callable[[], bytes]] = {
        "PNG": lambda: with_checksums(
            bytes(data[:16]) + struct.pack(">II", side % 2**32, other % 2**32) + bytes(data[24:])
        ),
        "GIF": lambda: gif_bomb(side, other, random),
        "BMP": lambda: (
            bytes(data[:18]) + struct.pack("<Ii", side % 2**32, min(other, 2**31 - 1)) + bytes(data[26:])
        ),
        "JPEG": lambda: jpeg_bomb(bytes(data), side, other),
        "PPM": lambda: b"P6 %d %d 255\n" % (side, other) + b"\0" * 99,
        "TGA": lambda: bytes(data[:12]) + struct.pack("<HH", side % 2**16, other % 2**16) + bytes(data[16:]),
    }
    if kind in writers:
        return writers[kind]()
    if random.random() < 0.5:
        return png_bomb(random)
    return bytes(data)


def png_bomb(random: Random) -> bytes:
    """A PNG that really is large: rows of zeros that are compressed a thousandfold, or text chunks."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    width, height = random.choice(((12_000, 12_000), (30_000, 30_000), (100, 100)))
    rows = zlib.compress(bytes(1 + width // 8) * min(height, 12_000), 9)
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(60_000_000), 9)) if width == 100 else b""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + text + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def gif_bomb(width: int, height: int, random: Random) -> bytes:
    """Many frames on a large screen."""
    frame = b"\x21\xf9\x04\x00\x00\x00\x00\x00,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0"
    head = b"GIF89a" + struct.pack("<HH", min(width, 65_535), min(height, 65_535)) + b"\x80\0\0" + bytes(6)
    return head + frame * random.choice((1, 100, 5000)) + b";"


def jpeg_bomb(data: bytes, width: int, height: int) -> bytes:
    for marker in (b"\xff\xc0", b"\xff\xc2"):
        place = data.find(marker)
        if place > 0:
            return data[: place + 5] + struct.pack(">HH", height % 2**16, width % 2**16) + data[place + 9 :]
    return data


__all__ = ["CascadeError", "World"]
