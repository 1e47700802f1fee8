"""Pictures of the toy world: soft edges from signed distances, shading lit from the top left, soft shadows.

The scenes themselves are in `scenes.py`; their names are importable from here as well. A frame's proportions do not
matter: lengths are fractions of its shorter side.
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
    SceneTable,
    held_out_reason,
    sample_scenes,
)
from cascade_nodes.demo.shapes import OTHER_SHAPES, TAUGHT_SHAPES
from cascade_nodes.demo.shapes import SHAPES as SHAPE_DISTANCES

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
    "SceneTable",
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
SHADOW_OFFSET, SHADOW_BLUR = (0.010, 0.018), 0.022  # fractions of the shorter side
SHADOW_DEPTH = 0.30  # share of the light
BEVEL = 0.40  # how far the rounding of an edge reaches inwards, in radii
HIGHLIGHT = (-0.30, -0.36, 0.24, 0.38)  # centre x, y and width in radii; strength
FAR = 9.0  # the distance of a missing object

DRAWN = {**SHAPE_DISTANCES, **TAUGHT_SHAPES, **OTHER_SHAPES}
_SHAPE_INDEX = {name: index for index, name in enumerate(DRAWN)}
_COLOUR_INDEX = {name: index for index, name in enumerate(COLOURS)}


class Packed(NamedTuple):
    """Scenes as tensors, with any number of slots for objects; an empty slot has shape -1."""

    shape: Tensor  # (N, slots) int64, index into DRAWN, which begins with SHAPES
    colour: Tensor  # (N, slots, 3) float32 in [0, 1]
    centre: Tensor  # (N, slots, 2) float32, (x, y), fractions of the frame
    radius: Tensor  # (N, slots) float32, fractions of the frame's shorter side
    background: Tensor  # (N, 2, 3) float32 in [0, 1], top and bottom
    angle: Tensor | None = None  # (N, slots) float32, in radians: by how much an object is turned

    def rows(self, rows: slice, device: str | torch.device) -> "Packed":
        """Some of the scenes, on a device."""
        angle = None if self.angle is None else self.angle[rows].to(device)
        return Packed._make([*(column[rows].to(device) for column in self[:5]), angle])


def pack(scenes: Sequence[Scene] | SceneTable) -> Packed:
    """Packs scenes into CPU tensors for `render`; a SceneTable is packed without a loop."""
    if isinstance(scenes, SceneTable):
        kind, pose = scenes.kind, np.concatenate([scenes.centre, scenes.radius[..., None]], 2)
        shape, colour = np.where(kind < 0, -1, kind // 8), np.where(kind < 0, 0, kind % 8)
        pose, background = np.where(kind[..., None] < 0, 0.5, pose).astype(np.float32), scenes.background
    else:
        n, slots = len(scenes), max([2, *(len(scene.objects) for scene in scenes)])
        shape, colour = np.full((n, slots), -1, np.int64), np.zeros((n, slots), np.int64)
        pose = np.full((n, slots, 3), 0.5, np.float32)
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
        torch.from_numpy(BACKGROUND_RGB[background].reshape(len(shape), 2, 3)),
    )


def render(
    scenes: Sequence[Scene] | SceneTable | Packed,
    size: int | tuple[int, int] = 256,
    device: str | torch.device = "cpu",
    chunk: int = 128,
) -> Tensor:
    """Pictures (N, 3, height, width), uint8 sRGB, on `device`; `chunk` scenes are drawn at a time.

    size: pixels of both sides, or (height, width).
    """
    height, width = (size, size) if isinstance(size, int) else size
    packed = scenes if isinstance(scenes, Packed) else pack(scenes)
    pictures = torch.empty(len(packed.shape), 3, height, width, dtype=torch.uint8, device=device)
    for start in range(0, len(pictures), chunk):
        rows = slice(start, start + chunk)
        pictures[rows] = _draw(packed.rows(rows, device), height, width)
    return pictures


@torch.no_grad()
def _draw(packed: Packed, height: int, width: int) -> Tensor:
    """(n scenes) -> (n, 3, H, W) uint8"""
    short = min(height, width)
    down, across = (torch.arange(side, device=packed.radius.device) + 0.5 for side in (height, width))
    top, bottom = packed.background[:, 0, :, None, None], packed.background[:, 1, :, None, None]
    canvas = (top + (bottom - top) * (down / height)[:, None]).repeat(1, 1, 1, width)  # (n, 3, H, W)
    # From here on, lengths are in units of the shorter side.
    sides = packed.centre.new_tensor([width / short, height / short])
    packed, down, across = packed._replace(centre=packed.centre * sides), down / short, across / short
    slots = range(packed.shape.shape[1])
    for slot in slots:
        x, y = _local(packed, slot, down, across, SHADOW_OFFSET)
        distance = _distance(packed, slot, x, y) * packed.radius[:, slot, None, None]
        depth = (0.5 - 0.5 * distance / SHADOW_BLUR).clamp(0, 1)
        depth = depth * depth * (3 - 2 * depth)  # smoothstep
        canvas = canvas * (1 - SHADOW_DEPTH * depth)[:, None]
    for slot in slots:
        x, y = _local(packed, slot, down, across, (0.0, 0.0))
        distance = _distance(packed, slot, x, y)
        cover = (0.5 - distance * packed.radius[:, slot, None, None] * short).clamp(0, 1)[:, None]
        canvas = canvas + (_shade(packed.colour[:, slot], x, y, distance) - canvas) * cover
    return (canvas * 255).round_().clamp_(0, 255).to(torch.uint8)


def _local(
    packed: Packed, slot: int, down: Tensor, across: Tensor, offset: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """x and y of every pixel from the object's centre plus offset, in the object's radii: (n, H, W) each."""
    centre, radius = packed.centre[:, slot], packed.radius[:, slot, None]
    x = (across - centre[:, :1] - offset[0]) / radius  # (n, W)
    y = (down - centre[:, 1:] - offset[1]) / radius  # (n, H)
    return x[:, None, :].expand(-1, len(down), -1), y[:, :, None].expand(-1, -1, len(across))


def _distance(packed: Packed, slot: int, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance of every scene's own shape, in radii: (n, H, W); FAR where there is no object."""
    distance = torch.full(x.shape, FAR, device=x.device)
    for index, function in enumerate(DRAWN.values()):
        chosen = (packed.shape[:, slot] == index).nonzero()[:, 0]
        if len(chosen):
            own_x, own_y = x[chosen], y[chosen]
            if packed.angle is not None:
                cos, sin = (f(packed.angle[chosen, slot, None, None]) for f in (torch.cos, torch.sin))
                own_x, own_y = cos * own_x + sin * own_y, cos * own_y - sin * own_x
            distance[chosen] = function(own_x, own_y)
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
    # Weaker on black, which it would turn grey.
    highlight = highlight * (0.4 + 0.6 * colour.amax(1))[:, None, None]
    ambient = 0.07 * (light - 0.8).clamp_min(0)  # so that black, too, shows its form
    return (lit + ambient[:, None] + (1 - lit) * highlight[:, None]).clamp(0, 1)
