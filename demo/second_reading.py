"""A second judge with other methods than `reading`, for comparison.

1. the background: a straight line through each channel of the frame's sides, row by row;
2. the objects: connected regions whose log ratio to the background is not that of a shadow, which darkens all
   channels equally;
3. colour: hue, saturation and brightness of a region's median;
4. shape: the region's outer and inner reach from its centroid in each direction, compared with the eight shapes.
"""

from collections.abc import Sequence
from functools import cache
from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor

from cascade_nodes.demo.captions import Spec
from cascade_nodes.demo.judge import read, score
from cascade_nodes.demo.reading import (
    LARGE,
    SIZE,
    FoundObject,
    Reading,
    label_regions,
    largest_regions,
    prepared,
)
from cascade_nodes.demo.shares import Share, share
from cascade_nodes.demo.world import BACKGROUND_RGB, BACKGROUNDS, COLOUR_RGB, COLOURS, SHAPE_DISTANCES, SHAPES

SIDE = 6  # pixels of the frame's sides
BACKGROUND_LIMIT = 0.10  # the greatest mean difference (RGB in [0, 1]) at which a background is recognised
SHADOW = (-0.40, 0.06)  # range of the log ratio in which a pixel is still background
OBJECT_LIMIT = 0.14  # least distance of an object from that range, in logarithms
FLOOR = 0.06  # added to picture and background before the logarithm, which is steep near black
GRID = 2  # pixels; regions are connected on a coarser grid
# Share of its local colour that marks an object's edge, and the pixels across which that colour is averaged.
COVER, AROUND = 0.5, 17
DIRECTIONS, STEPS, REACH = 90, 72, 2.1  # of the profile; REACH in radii of a disc of the same area
# The greatest root mean square difference of profiles: a wobbly outline costs a shape with thin parts more.
PROFILE_LIMIT = dict.fromkeys(SHAPES, 0.115) | {"star": 0.15, "ring": 0.15, "cross": 0.15}
BLACK = 0.30  # greatest brightness of black
WHITE = 0.16, 0.62  # greatest saturation and least brightness of white
LEAST_SATURATION, MOST_HUE = 0.35, 22.0  # of the other colours; degrees
RADII = (0.06, 0.30)


@torch.no_grad()
def read_again(images: Tensor, chunk: int = 64) -> list[Reading]:
    """Reads pictures (N, 3, H, W), uint8 or float in [0, 1]; on a CUDA device where there is one."""
    return [reading for batch in prepared(images, chunk, GRID) for reading in _read(batch)]


def _read(images: Tensor) -> list[Reading]:
    ground, kinds = _background(images)
    picture, regions = _regions(images, ground)
    objects: list[list[FoundObject]] = [[] for _ in kinds]
    if len(picture):
        for index, found_object in zip(picture.tolist(), _objects(images[picture], regions), strict=True):
            objects[index].append(found_object)
    aspect = images.shape[-1] / images.shape[-2]
    return [Reading(tuple(found), kind, aspect) for found, kind in zip(objects, kinds, strict=True)]


def _background(images: Tensor) -> tuple[Tensor, list[str | None]]:
    """Background (N, 3, H, 1) and its name."""
    height = images.shape[-2]
    rows = torch.cat([images[..., :SIDE], images[..., -SIDE:]], -1).median(-1).values  # (N, 3, H)
    down = torch.linspace(0, 1, height, device=images.device)
    centred = down - down.mean()
    slope = (rows * centred).sum(-1, keepdim=True) / centred.square().sum()
    line = rows.mean(-1, keepdim=True) + slope * centred  # (N, 3, H)
    gradients = torch.from_numpy(BACKGROUND_RGB).to(images)  # (5, 2, 3)
    known = torch.lerp(gradients[:, 0, :, None], gradients[:, 1, :, None], down)  # (5, 3, H)
    smallest, kind = (line[:, None] - known).abs().mean((2, 3)).min(1)
    names = zip(kind.tolist(), smallest.tolist(), strict=True)
    return line[..., None], [BACKGROUNDS[k] if d < BACKGROUND_LIMIT else None for k, d in names]


def _regions(images: Tensor, ground: Tensor) -> tuple[Tensor, Tensor]:
    """Connected regions, the largest first: the picture's index (M,), the region (M, H, W) bool."""
    ratio = ((images + FLOOR) / (ground + FLOOR)).log()  # (N, 3, H, W)
    mean = ratio.mean(1)
    chroma = (ratio - mean[:, None]).square().sum(1).sqrt()
    unlike_shadow = (mean - mean.clamp(*SHADOW)).abs()
    mask = (torch.hypot(chroma, unlike_shadow) > OBJECT_LIMIT).float()
    mask = F.avg_pool2d(mask[:, None], 5, 1, 2)[:, 0] > 0.5  # the majority around each pixel
    coarse = F.avg_pool2d(mask[:, None].float(), GRID)[:, 0] >= 0.5
    labels = label_regions(coarse)
    picture, label = largest_regions(labels, GRID)
    fine = labels.repeat_interleave(GRID, 1).repeat_interleave(GRID, 2)
    region = (fine[picture] == label[:, None, None]) & mask[picture]
    near = (
        F.max_pool2d(region[:, None].float(), 5, 1, 2)[:, 0] > 0
    )  # a white object's edge is under the limit
    return picture, near & (_cover(images[picture], ground[picture], region) > COVER)


def _cover(images: Tensor, ground: Tensor, regions: Tensor) -> Tensor:
    """Coverage of each pixel (M, H, W) by the object, modelled as its local colour blended over the background.

    With its mean colour instead, the shaded side of a white object would be nearer to a light background.
    """
    weight = regions[:, None].float()
    around = F.avg_pool2d(images * weight, AROUND, 1, AROUND // 2)
    share = F.avg_pool2d(weight, AROUND, 1, AROUND // 2)
    whole = around / share.clamp_min(1e-3) - ground  # (M, 3, H, W)
    return ((images - ground) * whole).sum(1) / whole.square().sum(1).clamp_min(1e-4)


def _objects(images: Tensor, regions: Tensor) -> list[FoundObject]:
    """images (M, 3, H, W), regions (M, H, W)"""
    outer, inner, area, centroid = _profiles(regions)
    templates = _templates()
    names, unit_area, unit_centroid = templates[4], templates[2].to(area), templates[3].to(area)
    difference = (
        (outer[:, None] - templates[0].to(outer)).square().mean(-1)
        + (inner[:, None] - templates[1].to(inner)).square().mean(-1)
    ).sqrt()  # (M, K)
    smallest, best = difference.min(1)
    radius = (area / unit_area[best]).sqrt()
    frame = area.new_tensor([regions.shape[-1], regions.shape[-2]]) / SIZE
    centre = (centroid - radius[:, None] * unit_centroid[best]) / frame
    found = []
    rows = zip(best.tolist(), smallest.tolist(), radius.tolist(), centre.tolist(), strict=True)
    for number, (shape, distance, r, (x, y)) in enumerate(rows):
        right = distance < PROFILE_LIMIT[names[shape]] and RADII[0] < r < RADII[1]
        colour = _colour(images[number], regions[number])
        found.append(
            FoundObject(
                shape=names[shape] if right else None,
                colour=colour,
                size="large" if r >= LARGE else "small",
                x=x,
                y=y,
                radius=r,
                shape_fit=max(1 - distance, 0.0),
                colour_share=float(colour is not None),
            )
        )
    return found


def _colour(image: Tensor, region: Tensor) -> str | None:
    """Name of the median colour inside a region (H, W) of a picture (3, H, W)."""
    inside = -F.max_pool2d(-region[None, None].float(), 5, 1, 2)[0, 0] > 0
    pixels = image[:, inside if inside.any() else region]
    hue, saturation, brightness = _hsv(pixels.median(1).values)
    if brightness < BLACK:
        return "black"
    if saturation < WHITE[0]:
        return "white" if brightness > WHITE[1] else None
    hues = {
        name: _hsv(torch.from_numpy(rgb))[0]
        for name, rgb in zip(COLOURS, COLOUR_RGB, strict=True)
        if name not in ("black", "white")
    }
    apart = {name: abs((hue - other + 180) % 360 - 180) for name, other in hues.items()}
    nearest = min(apart, key=lambda name: apart[name])
    return nearest if saturation > LEAST_SATURATION and apart[nearest] < MOST_HUE else None


def _hsv(rgb: Tensor) -> tuple[float, float, float]:
    """Hue in degrees, saturation and brightness of a colour (3,)."""
    red, green, blue = rgb.tolist()
    high, low = max(red, green, blue), min(red, green, blue)
    span = high - low
    if span == 0:
        return 0.0, 0.0, high
    if high == red:
        hue = (green - blue) / span % 6
    else:
        hue = (blue - red) / span + 2 if high == green else (red - green) / span + 4
    return 60 * hue, span / high, high


def _profiles(regions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outer and inner reach (M, DIRECTIONS) of regions (M, H, W) from their centroids, in radii of a disc of the same
    area; area (M,) and centroid (M, 2), in units of the shorter side.
    """
    solid = regions.float()
    height, width = regions.shape[-2:]
    down, across = ((torch.arange(side, device=regions.device) + 0.5) / SIZE for side in (height, width))
    count = solid.sum((1, 2))
    centroid = torch.stack([(solid.sum(1) * across).sum(1), (solid.sum(2) * down).sum(1)], 1) / count[:, None]
    area = count / SIZE**2
    unit = (area / pi).sqrt()
    angle = torch.arange(DIRECTIONS, device=regions.device) * (2 * pi / DIRECTIONS)
    step = (torch.arange(STEPS, device=regions.device) + 0.5) * (REACH / STEPS)
    ray = torch.stack([angle.sin(), -angle.cos()], 1)[:, None] * step[:, None]  # (DIRECTIONS, STEPS, 2)
    points = centroid[:, None, None] + ray * unit[:, None, None, None]
    frame = centroid.new_tensor([width / SIZE, height / SIZE])
    along = F.grid_sample(solid[:, None], 2 * points / frame - 1, align_corners=False)[:, 0]
    along = along.clamp_min(0)  # (M, DIRECTIONS, STEPS)
    inside = along > 0.5
    last = torch.where(inside, step, 0.0).amax(-1)
    first = torch.where(inside, step, REACH).amin(-1)
    return last, torch.where(last > 0, first, 0.0), area, centroid


@cache
def _templates() -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[str, ...]]:
    """Profiles of the shapes (K, DIRECTIONS), their areas and centroids at radius 1, and names."""
    axis = (torch.arange(4 * SIZE) + 0.5) / SIZE - 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    masks = torch.stack([SHAPE_DISTANCES[name](x, y) < 0 for name in SHAPES])
    outer, inner, area, centroid = _profiles(masks)
    return outer, inner, area, centroid - 2, SHAPES


def agreement(images: Tensor, specs: Sequence[Spec]) -> dict[str, Share]:
    """Shares of pictures on which both judges agree whether all is right, and of those right by either judge."""
    first = [score(reading, spec).all_right for reading, spec in zip(read(images), specs, strict=True)]
    second = [score(reading, spec).all_right for reading, spec in zip(read_again(images), specs, strict=True)]
    return {
        "agreement": share(a == b for a, b in zip(first, second, strict=True)),
        "first_judge": share(first),
        "second_judge": share(second),
    }
