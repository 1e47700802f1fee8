"""Pictures of the toy world: soft edges from signed distances, shading lit from the top left, soft shadows.

The scenes themselves are in `scenes.py`; their names are importable from here as well.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cascade_nodes.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    INVERSE,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    held_out_reason,
    sample_scenes,
)
from cascade_nodes.demo.shapes import SHAPES as SHAPE_DISTANCES
from cascade_nodes.demo.shapes import TAUGHT_SHAPES

__all__ = [
    "BACKGROUNDS",
    "BACKGROUND_RGB",
    "COLOURS",
    "COLOUR_RGB",
    "INVERSE",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "Packed",
    "Scene",
    "SceneObject",
    "held_out_reason",
    "pack",
    "render",
    "sample_scenes",
]

COLOUR_RGB = (
    np.array(
        [
            (222, 34, 38),
            (30, 156, 66),
            (34, 88, 226),
            (252, 216, 36),
            (146, 48, 192),
            (252, 132, 20),
            (26, 26, 30),
            (244, 244, 247),
        ],
        dtype=np.float32,
    )
    / 255
)
# Top and bottom of each background's vertical gradient.
BACKGROUND_RGB = (
    np.array(
        [
            [(160, 214, 255), (142, 188, 224)],
            [(230, 204, 154), (204, 178, 132)],
            [(178, 238, 200), (156, 212, 178)],
            [(255, 194, 208), (228, 170, 186)],
            [(172, 174, 180), (146, 148, 154)],
        ],
        dtype=np.float32,
    )
    / 255
)

LIGHT = (-0.55, -0.83)  # towards the light, in the plane of the picture
SHADOW_OFFSET, SHADOW_BLUR = (0.010, 0.018), 0.022  # fractions of the frame
SHADOW_DEPTH = 0.30  # share of the light
BEVEL = 0.40  # how far the rounding of an edge reaches inwards, in radii
HIGHLIGHT = (-0.30, -0.36, 0.24, 0.38)  # centre x, y and width in radii; strength
FAR = 9.0  # the distance of a missing object

_DRAWN = {**SHAPE_DISTANCES, **TAUGHT_SHAPES}
_SHAPE_INDEX = {name: index for index, name in enumerate(_DRAWN)}
_COLOUR_INDEX = {name: index for index, name in enumerate(COLOURS)}


class Packed(NamedTuple):
    """Scenes as tensors. Slot 1 of a single object has shape -1."""

    shape: Tensor  # (N, 2) int64, index into SHAPES and then TAUGHT_SHAPES
    colour: Tensor  # (N, 2, 3) float32 in [0, 1]
    centre: Tensor  # (N, 2, 2) float32, (x, y)
    radius: Tensor  # (N, 2) float32
    background: Tensor  # (N, 2, 3) float32 in [0, 1], top and bottom


def pack(scenes: Sequence[Scene]) -> Packed:
    """Packs scenes into CPU tensors, for `render`."""
    n = len(scenes)
    shape, colour = np.full((n, 2), -1, np.int64), np.zeros((n, 2), np.int64)
    pose = np.full((n, 2, 3), 0.5, np.float32)
    for i, scene in enumerate(scenes):
        for slot, o in enumerate(scene.objects):
            shape[i, slot], colour[i, slot] = _SHAPE_INDEX[o.shape], _COLOUR_INDEX[o.colour]
            pose[i, slot] = o.x, o.y, o.radius
    background = np.array([BACKGROUNDS.index(scene.background) for scene in scenes], np.int64)
    return Packed(
        torch.from_numpy(shape),
        torch.from_numpy(COLOUR_RGB[colour]),
        torch.from_numpy(pose[..., :2].copy()),
        torch.from_numpy(pose[..., 2].copy()),
        torch.from_numpy(BACKGROUND_RGB[background].reshape(n, 2, 3)),
    )


def render(
    scenes: Sequence[Scene] | Packed, size: int = 256, device: str | torch.device = "cpu", chunk: int = 128
) -> Tensor:
    """Pictures (N, 3, size, size), uint8 sRGB, on `device`; `chunk` scenes are drawn at a time."""
    packed = scenes if isinstance(scenes, Packed) else pack(scenes)
    pictures = torch.empty(len(packed.shape), 3, size, size, dtype=torch.uint8, device=device)
    for start in range(0, len(pictures), chunk):
        batch = Packed(*(tensor[start : start + chunk].to(device) for tensor in packed))
        pictures[start : start + chunk] = _draw(batch, size)
    return pictures


@torch.no_grad()
def _draw(packed: Packed, size: int) -> Tensor:
    """(n scenes) -> (n, 3, size, size) uint8"""
    grid = (torch.arange(size, device=packed.radius.device) + 0.5) / size
    top, bottom = packed.background[:, 0, :, None, None], packed.background[:, 1, :, None, None]
    canvas = (top + (bottom - top) * grid[:, None]).repeat(1, 1, 1, size)  # (n, 3, H, W)
    for slot in range(2):
        x, y = _local(packed, slot, grid, SHADOW_OFFSET)
        distance = _distance(packed.shape[:, slot], x, y) * packed.radius[:, slot, None, None]
        depth = (0.5 - 0.5 * distance / SHADOW_BLUR).clamp(0, 1)
        depth = depth * depth * (3 - 2 * depth)  # smoothstep
        canvas = canvas * (1 - SHADOW_DEPTH * depth)[:, None]
    for slot in range(2):
        x, y = _local(packed, slot, grid, (0.0, 0.0))
        distance = _distance(packed.shape[:, slot], x, y)
        cover = (0.5 - distance * packed.radius[:, slot, None, None] * size).clamp(0, 1)[:, None]
        canvas = canvas + (_shade(packed.colour[:, slot], x, y, distance) - canvas) * cover
    return (canvas * 255).round_().clamp_(0, 255).to(torch.uint8)


def _local(packed: Packed, slot: int, grid: Tensor, offset: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """x and y of every pixel from the object's centre plus offset, in the object's radii: (n, H, W) each."""
    centre, radius = packed.centre[:, slot], packed.radius[:, slot, None]
    x = (grid - centre[:, :1] - offset[0]) / radius  # (n, W)
    y = (grid - centre[:, 1:] - offset[1]) / radius  # (n, H)
    return x[:, None, :].expand(-1, len(grid), -1), y[:, :, None].expand(-1, -1, len(grid))


def _distance(shape: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance of every scene's own shape (n,), in radii: (n, H, W); FAR where there is no object."""
    distance = torch.full(x.shape, FAR, device=x.device)
    for index, function in enumerate(_DRAWN.values()):
        chosen = (shape == index).nonzero()[:, 0]
        if len(chosen):
            distance[chosen] = function(x[chosen], y[chosen])
    return distance


def _shade(colour: Tensor, x: Tensor, y: Tensor, distance: Tensor) -> Tensor:
    """Lit colour (n, 3, H, W): a gradient over the object, edges rounded like a pillow, a soft highlight."""
    slope_y, slope_x = torch.gradient(distance, dim=(1, 2))
    steepness = torch.hypot(slope_x, slope_y).clamp_min(1e-6)
    facing = (slope_x * LIGHT[0] + slope_y * LIGHT[1]) / steepness  # 1 where an edge faces the light
    edge = (1 + distance / BEVEL).clamp(0, 1) ** 2
    light = 0.97 + 0.10 * (x * LIGHT[0] + y * LIGHT[1]) + 0.13 * edge * facing
    lit = colour[:, :, None, None] * light[:, None]
    hx, hy, width, strength = HIGHLIGHT
    highlight = strength * torch.exp(-((x - hx) ** 2 + (y - hy) ** 2) / (2 * width**2))
    highlight = (
        highlight * (0.4 + 0.6 * colour.amax(1))[:, None, None]
    )  # less on black, which it would turn grey
    ambient = 0.07 * (light - 0.8).clamp_min(0)  # so that black, too, shows its form
    return (lit + ambient[:, None] + (1 - lit) * highlight[:, None]).clamp(0, 1)
