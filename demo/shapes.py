"""Signed distances of the toy world's eight shapes, of one taught later, and of some without a name.

All in units of the object's radius.

Each function takes x and y (tensors of one size; x to the right, y down, the centre at 0) and returns the
distance to the outline: negative inside, exact outside, so that shadows and soft edges follow the form.
Every shape lies within [-1, 1] in both axes.
"""

from collections.abc import Callable
from itertools import pairwise
from math import cos, pi, sin

import torch
from torch import Tensor

CIRCLE_RADIUS = 0.92
SQUARE_HALF = 0.80
RING_MIDDLE, RING_HALF = 0.70, 0.24
CROSS_LENGTH, CROSS_HALF = 0.96, 0.33
DIAMOND_HALF = (0.70, 1.0)
TRIANGLE_TOP, TRIANGLE_BASE, TRIANGLE_HALF = -0.88, 0.76, 0.98
STAR_TIP, STAR_NOTCH, STAR_CENTRE = 1.03, 0.46, 0.07
HEART_SIDE, HEART_CENTRE = 1.12, 0.08
ELLIPSE_HALF = (1.0, 0.6)
BAR_HALF, BAR_ROUND = (1.0, 0.45), 0.2
OBLONG_HALF = (0.85, 0.5)
HOUSE_TOP, HOUSE_EAVES, HOUSE_BASE, HOUSE_HALF = -1.0, -0.10, 0.85, 0.66


def circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - CIRCLE_RADIUS


def ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - RING_MIDDLE).abs() - RING_HALF


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    dx, dy = x.abs() - half_width, y.abs() - half_height
    return torch.hypot(dx.clamp_min(0), dy.clamp_min(0)) + torch.maximum(dx, dy).clamp_max(0)


def square(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, SQUARE_HALF, SQUARE_HALF)


def cross(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, CROSS_LENGTH, CROSS_HALF), _box(x, y, CROSS_HALF, CROSS_LENGTH))


def _edge(x: Tensor, y: Tensor, start: tuple[float, float], end: tuple[float, float]) -> Tensor:
    """Distance to the segment from start to end, negative on its left side as seen along it (y down)."""
    ex, ey = end[0] - start[0], end[1] - start[1]
    px, py = x - start[0], y - start[1]
    along = ((px * ex + py * ey) / (ex * ex + ey * ey)).clamp(0, 1)
    distance = torch.hypot(px - along * ex, py - along * ey)
    return torch.where(px * ey - py * ex > 0, -distance, distance)


def _enclosed(*edges: Tensor) -> Tensor:
    """Distance to the outline made of these edges; negative (inside) where all edges are."""
    distances = torch.stack(edges)
    nearest = distances.abs().amin(0)
    return torch.where((distances < 0).all(0), -nearest, nearest)


def diamond(x: Tensor, y: Tensor) -> Tensor:
    return _edge(x.abs(), y.abs(), (0.0, DIAMOND_HALF[1]), (DIAMOND_HALF[0], 0.0))


def triangle(x: Tensor, y: Tensor) -> Tensor:
    x = x.abs()
    flank = _edge(x, y, (TRIANGLE_HALF, TRIANGLE_BASE), (0.0, TRIANGLE_TOP))
    base = _edge(x, y, (0.0, TRIANGLE_BASE), (TRIANGLE_HALF, TRIANGLE_BASE))
    return _enclosed(flank, base)


def star(x: Tensor, y: Tensor) -> Tensor:
    """Five points: the plane is folded into half of one point, where the outline is a single segment."""
    y = y - STAR_CENTRE
    sector = 2 * pi / 5
    angle = torch.remainder(torch.atan2(x, -y) + sector / 2, sector) - sector / 2
    radius, angle = torch.hypot(x, y), angle.abs()
    notch = (STAR_NOTCH * sin(sector / 2), STAR_NOTCH * cos(sector / 2))
    return _edge(radius * angle.sin(), radius * angle.cos(), (0.0, STAR_TIP), notch)


def heart(x: Tensor, y: Tensor) -> Tensor:
    """Square standing on its corner, with half a disc on each of its upper sides."""
    x, y = x.abs(), y - HEART_CENTRE
    standing = _box((x + y) * 0.5**0.5, (x - y) * 0.5**0.5, HEART_SIDE / 2, HEART_SIDE / 2)
    lobe = HEART_SIDE / 8**0.5
    return torch.minimum(standing, torch.hypot(x - lobe, y + lobe) - HEART_SIDE / 2)


def house(x: Tensor, y: Tensor) -> Tensor:
    """Roof on walls, with the corners of triangles and squares, which Stage B can draw at any size."""
    x = x.abs()
    roof = _edge(x, y, (HOUSE_HALF, HOUSE_EAVES), (0.0, HOUSE_TOP))
    wall = _edge(x, y, (HOUSE_HALF, HOUSE_BASE), (HOUSE_HALF, HOUSE_EAVES))
    base = _edge(x, y, (0.0, HOUSE_BASE), (HOUSE_HALF, HOUSE_BASE))
    return _enclosed(roof, wall, base)


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "star": star,
    "heart": heart,
    "ring": ring,
    "cross": cross,
    "diamond": diamond,
}

# Never trained on; taught by a LoRA.
TAUGHT_SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"house": house}


# Shapes without a word, seen only by networks that decode pictures. Those that may look like one of the eight have
# colours without a name; those of UNLIKE, which resemble none at any angle, have any colour.


def ellipse(x: Tensor, y: Tensor) -> Tensor:
    """Estimate of the distance, exact at the outline: a length over that of its gradient."""
    a, b = ELLIPSE_HALF
    scaled, slope = torch.hypot(x / a, y / b), torch.hypot(x / a**2, y / b**2)
    return scaled * (scaled - 1) / slope.clamp_min(1e-4)


def bar(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, BAR_HALF[0] - BAR_ROUND, BAR_HALF[1] - BAR_ROUND) - BAR_ROUND


def oblong(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, *OBLONG_HALF)


def _polygon(sides: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Regular polygon: the plane is folded into half of one side's sector."""
    sector = 2 * pi / sides

    def distance(x: Tensor, y: Tensor) -> Tensor:
        angle = torch.remainder(torch.atan2(x, -y), sector) - sector / 2
        radius = torch.hypot(x, y)
        along, away = radius * angle.abs().sin(), radius * angle.cos() - cos(sector / 2)
        beyond = (along - sin(sector / 2)).clamp_min(0)
        return torch.where(away > 0, torch.hypot(away, beyond), away)

    return distance


Point = tuple[float, float]


def _mirrored(*corners: Point) -> Callable[[Tensor, Tensor], Tensor]:
    """Polygon of which these corners, from the lowest on its axis to the highest, are the right half."""

    def distance(x: Tensor, y: Tensor) -> Tensor:
        x = x.abs()
        return _enclosed(*(_edge(x, y, start, end) for start, end in pairwise(corners)))

    return distance


UNLIKE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pencil": _mirrored((0.0, 0.95), (0.42, 0.95), (0.42, -0.3), (0.0, -1.0)),
    "post": _mirrored((0.0, 1.0), (0.36, 1.0), (0.36, -0.55), (0.0, -1.0)),
    "boat": _mirrored((0.0, 0.5), (0.6, 0.5), (1.0, -0.5), (0.0, -0.5)),
    "chevron": _mirrored((0.0, -0.05), (0.95, 0.6), (0.95, 0.1), (0.0, -0.6)),
}
OTHER_SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ellipse": ellipse,
    "bar": bar,
    "oblong": oblong,
    "pentagon": _polygon(5),
    "hexagon": _polygon(6),
    **UNLIKE,
}
