"""Input pictures of the example graphs: `python -m cascade_nodes.demo.example_pictures [FOLDER]`.

Scenes of the toy world as PNG files, by default into `example_workflows/input`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from cascade_nodes.cascade_core.writing import replacing
from cascade_nodes.demo.recipe import PICTURE
from cascade_nodes.demo.scenes import Scene, SceneObject
from cascade_nodes.demo.world import render

FOLDER = Path(__file__).parents[1] / "example_workflows" / "input"
NARROW = 144  # pixels of the width that outpainting starts from
SMALL = 16  # pixels a side that super resolution starts from
BRUSH = 0.235  # radius of the hole, in fractions of the frame

STAR_AND_RING = Scene(
    (
        SceneObject("star", "purple", "large", 0.33, 0.38, 0.19),
        SceneObject("ring", "yellow", "small", 0.74, 0.60, 0.12),
    ),
    "grass",
    "left",
)
HEART_AND_SQUARE = Scene(
    (
        SceneObject("heart", "red", "large", 0.29, 0.50, 0.19),
        SceneObject("square", "blue", "small", 0.72, 0.50, 0.12),
    ),
    "sky",
    "left",
)
DIAMOND = Scene((SceneObject("diamond", "orange", "large", 0.29, 0.50, 0.20),), "pink")
CROSS_AND_CIRCLE = Scene(
    (
        SceneObject("cross", "white", "large", 0.34, 0.34, 0.18),
        SceneObject("circle", "red", "large", 0.68, 0.71, 0.18),
    ),
    "sand",
    "above",
)


def pixels(scene: Scene) -> Tensor:
    """Picture of a scene, uint8 (256, 256, 3)."""
    return render([scene], PICTURE)[0].permute(1, 2, 0)


def shrunk(picture: Tensor, size: int) -> Tensor:
    """uint8 (H, W, 3) -> (size, size, 3), bicubic with antialiasing."""
    smaller = F.interpolate(
        picture.movedim(-1, 0)[None].float(), (size, size), mode="bicubic", antialias=True
    )
    return smaller[0].movedim(0, -1).round().clamp(0, 255).to(torch.uint8)


def with_hole(picture: Tensor, x: float, y: float) -> Tensor:
    """uint8 (H, W, 3) -> (H, W, 4): transparent, colours kept, in a disc around (x, y), as a mask is painted."""
    height, width = picture.shape[:2]
    rows = (torch.arange(height) + 0.5)[:, None] / height - y
    columns = (torch.arange(width) + 0.5)[None, :] / width - x
    hole = torch.hypot(rows, columns) < BRUSH
    return torch.cat([picture, torch.where(hole, 0, 255).to(torch.uint8)[..., None]], dim=2)


def example_pictures() -> dict[str, np.ndarray]:
    """{file name: uint8 (H, W, 3 or 4)}"""
    hole = HEART_AND_SQUARE.objects[1]
    pictures = {
        "cascade_scene.png": pixels(STAR_AND_RING),
        "cascade_hole.png": with_hole(pixels(HEART_AND_SQUARE), hole.x, hole.y),
        "cascade_narrow.png": pixels(DIAMOND)[:, :NARROW],
        "cascade_small.png": shrunk(pixels(CROSS_AND_CIRCLE), SMALL),
    }
    return {name: picture.numpy() for name, picture in pictures.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cascade_nodes.demo.example_pictures", description=__doc__
    )
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help="where to write them")
    folder = parser.parse_args(arguments).folder
    for name, picture in example_pictures().items():
        with replacing(folder / name) as temporary:
            Image.fromarray(picture).save(temporary, format="PNG", optimize=True)


if __name__ == "__main__":
    main()
