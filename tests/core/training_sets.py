"""Sets of pictures for the tests of training data, and an encoder whose latents can be worked out by hand."""

import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

SHAPES = [(256, 256)] * 7 + [(200, 340)] * 4 + [(400, 260)] * 3  # (height, width): three buckets at 256


class MeanColours:
    """A latent's first three channels are the mean colours of its 32 × 32 pixels; counts what it was given."""

    def __init__(self, fails_at: int | None = None):
        self.pictures, self.calls, self.fails_at = 0, 0, fails_at

    def __call__(self, images: Tensor) -> Tensor:
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        self.calls += 1
        self.pictures += len(images)
        return F.pad(F.avg_pool2d(images, 32), (0, 0, 0, 0, 0, 13))


def blocks(height: int, width: int, seed: int) -> Image.Image:
    """A picture of large smooth patches, so that a pixel more or less at an edge matters little."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def write_set(folder: Path, shapes=SHAPES, captions: int = 1) -> Path:
    """Numbered pictures of these (height, width), with `captions` captions each; every second one in a subfolder."""
    for number, shape in enumerate(shapes):
        place = folder / ("more" if number % 2 else ".")
        place.mkdir(parents=True, exist_ok=True)
        blocks(*shape, seed=number).save(place / f"{number:03}.png")
        lines = [f"picture {number}, text {i}" for i in range(captions)]
        (place / f"{number:03}.txt").write_text("\n".join(lines))
    return folder


def write_tar(path: Path, folder: Path) -> Path:
    """The files of a folder as a tar."""
    with tarfile.open(path, "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.add(file, file.relative_to(folder))
    return path


def png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)
