"""Reads a toy-world picture back: its objects and its background, by analysis without a learned model.

A picture is read in four steps:
1. the background: the gradient nearest to the picture's border, corrected by the border's remaining difference;
2. the objects: connected regions that are neither background nor shaded background;
3. colour: a vote of the pixels inside, each for the nearest palette colour in light, shade or highlight;
4. shape: the region, moved to its centroid and scaled to unit area, against the eight shapes treated likewise
   (intersection over union). Size and centre follow from the shape that fits best.
An attribute without a good match is None, so that a blot is not taken for an object.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.demo.shapes import TAUGHT_SHAPES
from cascade_nodes.demo.world import BACKGROUND_RGB, BACKGROUNDS, COLOUR_RGB, COLOURS, SHAPE_DISTANCES, SHAPES

SIZE = 256  # pixels of the shorter side at which pictures are read
BORDER = 6  # pixels; objects keep further away from the frame
BACKGROUND_LIMIT = 0.10  # the greatest median difference (RGB in [0, 1]) at which a background is recognised
SHADE = (0.72, 1.04)  # background times a factor in this range is still background (shadows)
OBJECT_LIMIT = 0.11  # the least distance (RGB in [0, 1]) of an object's pixel from the background
EDGE = 0.40  # share of an object's mean distance that marks its edge
CELL = 4  # pixels; regions are connected on a coarser grid
LEAST_AREA = 0.003  # share of the frame; smaller specks are ignored
MOST_OBJECTS = 6  # a picture's largest regions
# Greatest distance of a pixel from its colour, and smallest share of votes for a colour.
COLOUR_LIMIT, COLOUR_SHARE = (0.20, 0.55)
# The least intersection over union: a wobbly outline costs a thin shape more, and any blot is fairly round.
SHAPE_FIT = {
    "circle": 0.80,
    "square": 0.80,
    "triangle": 0.76,
    "star": 0.70,
    "heart": 0.80,
    "ring": 0.70,
    "cross": 0.70,
    "diamond": 0.76,
    "house": 0.82,  # more than any other shape's overlap with it
}
RADII = (0.06, 0.30)  # in frames; outside of it, an object has no shape (the frame itself is a square)
LARGE = 0.145  # radius, in frames, from which an object is large
WINDOW = 48  # pixels of the normalised region
LIGHTS, HIGHLIGHTS = (0.72, 0.86, 1.0, 1.1), (0.2, 0.38)


@dataclass(frozen=True, slots=True)
class FoundObject:
    """Region of a picture; centre in frames, radius in shorter sides; shape_fit: intersection over union;
    colour_share: of votes.
    """

    shape: str | None
    colour: str | None
    size: str
    x: float
    y: float
    radius: float
    shape_fit: float
    colour_share: float


@dataclass(frozen=True, slots=True)
class Reading:
    """Content of a picture, the largest object first."""

    objects: tuple[FoundObject, ...]
    background: str | None
    aspect: float = 1.0  # width by height


@torch.no_grad()
def read(images: Tensor, chunk: int = 64, taught: bool = False) -> list[Reading]:
    """Reads pictures (N, 3, H, W), uint8 or float in [0, 1], on any device; on a CUDA device where there is one.

    taught: also look for shapes that the demo was not trained on.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise CascadeError(f"read expects pictures (N, 3, H, W); it was given {tuple(images.shape)}.")
    names = (*SHAPES, *TAUGHT_SHAPES) if taught else SHAPES
    return [reading for batch in prepared(images, chunk, CELL) for reading in _read(batch, names)]


def prepared(images: Tensor, chunk: int, cell: int) -> Iterator[Tensor]:
    """Yields pictures in [0, 1] on the device that reads them, of whole cells and with a shorter side of about SIZE."""
    device = images.device if images.is_cuda or not torch.cuda.is_available() else torch.device("cuda")
    for batch in images.split(chunk):
        batch = batch.to(device)
        batch = batch.float() / 255 if batch.dtype == torch.uint8 else batch.float()
        batch = torch.nan_to_num(batch).clamp(0, 1)
        height, width = batch.shape[-2:]
        size = tuple(
            max(round(SIZE / cell * side / min(height, width)), 1) * cell for side in (height, width)
        )
        if batch.shape[-2:] != size:
            batch = F.interpolate(batch, size, mode="bilinear", antialias=True, align_corners=False)
        yield batch


def _read(images: Tensor, names: tuple[str, ...]) -> list[Reading]:
    aspect = images.shape[-1] / images.shape[-2]
    ground, kinds = _background(images)
    picture, regions = _regions(_difference(images, ground))
    objects: list[list[FoundObject]] = [[] for _ in kinds]
    if len(picture):
        colours, shares = _colours(images[picture], regions)
        shapes = _shapes(regions, colours, shares, names)
        for index, found_object in zip(picture.tolist(), shapes, strict=True):
            objects[index].append(found_object)
    return [
        Reading(tuple(picture_objects), kind, aspect)
        for picture_objects, kind in zip(objects, kinds, strict=True)
    ]


# 1. Background


def _background(images: Tensor) -> tuple[Tensor, list[str | None]]:
    """Empty background of each picture, (N, 3, H, W), and its name."""
    gradients = torch.from_numpy(BACKGROUND_RGB).to(images)  # (5, 2, 3)
    height, width = images.shape[-2:]
    down = torch.linspace(0, 1, height, device=images.device)
    candidates = torch.lerp(gradients[:, 0, :, None], gradients[:, 1, :, None], down)  # (5, 3, H)
    frame = torch.ones(height, width, dtype=torch.bool, device=images.device)
    frame[BORDER:-BORDER, BORDER:-BORDER] = False
    rows, columns = frame.nonzero(as_tuple=True)
    border = images[:, None, :, rows, columns] - candidates[:, :, rows]  # (N, 5, 3, pixels)
    error = border.abs().mean(2).median(-1).values  # (N, 5)
    smallest, kind = error.min(1)
    residual = border[torch.arange(len(images), device=images.device), kind]  # (N, 3, pixels)
    upper = rows < height // 2
    top, bottom = residual[..., upper].median(-1).values, residual[..., ~upper].median(-1).values
    # The medians count for the middles of the upper and the lower half.
    correction = top[..., None] + (bottom - top)[..., None] * (2 * down - 0.5)  # (N, 3, H)
    ground = (candidates[kind] + correction)[..., None].expand(-1, -1, -1, width)
    recognised = (smallest < BACKGROUND_LIMIT).tolist()
    return ground, [BACKGROUNDS[k] if ok else None for k, ok in zip(kind.tolist(), recognised, strict=True)]


# 2. Objects


def _difference(images: Tensor, ground: Tensor) -> Tensor:
    """Distance (N, H, W) of each pixel from the background and its shadow, in RGB."""
    shade = ((images * ground).sum(1) / ground.square().sum(1).clamp_min(1e-4)).clamp(*SHADE)
    return (images - shade[:, None] * ground).square().sum(1).sqrt()


def _regions(difference: Tensor) -> tuple[Tensor, Tensor]:
    """Connected regions, the largest first: the picture's index (M,), the region (M, H, W) bool."""
    mask = difference > OBJECT_LIMIT
    coarse = F.avg_pool2d(mask[:, None].float(), CELL)[:, 0] >= 0.5
    labels = label_regions(coarse)  # (N, h, w)
    picture, label = largest_regions(labels, CELL)
    grown = F.max_pool2d(labels[:, None].float(), 3, 1, 1)[:, 0].long()  # the edge cells belong to the region
    grown = torch.where(labels > 0, labels, grown)
    fine = grown.repeat_interleave(CELL, 1).repeat_interleave(CELL, 2)
    difference = difference[picture]
    region = (fine[picture] == label[:, None, None]) & (difference > OBJECT_LIMIT)
    # A blurred edge lies at half of the object's own contrast, not where the background ends.
    contrast = (difference * region).sum((1, 2)) / region.sum((1, 2))
    return picture, region & (difference > EDGE * contrast[:, None, None])


def label_regions(mask: Tensor) -> Tensor:
    """Labels of connected regions of (N, h, w), > 0, by spreading the greatest number within each."""
    numbers = torch.arange(1, mask[0].numel() + 1, device=mask.device, dtype=torch.float32)
    labels = numbers.view(1, *mask.shape[1:]) * mask
    while True:
        spread = labels
        for _ in range(8):
            spread = F.max_pool2d(spread[:, None], 3, 1, 1)[:, 0] * mask
        if torch.equal(spread, labels):
            return labels.long()
        labels = spread


def largest_regions(labels: Tensor, cell: int) -> tuple[Tensor, Tensor]:
    """Picture index (M,) and label (M,) of each region of (N, h, w) large enough for an object, the largest first."""
    areas = torch.zeros(len(labels), labels[0].numel() + 1, device=labels.device)
    areas.scatter_add_(1, labels.flatten(1), torch.ones_like(labels, dtype=torch.float32).flatten(1))
    areas[:, 0] = 0
    area, label = areas.topk(MOST_OBJECTS, 1)
    picture, rank = (area >= LEAST_AREA * (SIZE // cell) ** 2).nonzero(as_tuple=True)
    return picture, label[picture, rank]


# 3. Colour


@cache
def _palette() -> tuple[Tensor, Tensor]:
    """Palette of all colours in light, shade and highlight: (K, 3), and the colour's index (K,)."""
    colours = torch.from_numpy(COLOUR_RGB)
    shades = [colours * light for light in LIGHTS] + [
        torch.lerp(colours, torch.ones(3), h) for h in HIGHLIGHTS
    ]
    return torch.cat(shades).clamp(0, 1), torch.arange(len(colours)).repeat(len(shades))


def _colours(images: Tensor, regions: Tensor) -> tuple[list[str | None], list[float]]:
    """images (M, 3, H, W), regions (M, H, W) -> the colour that most pixels inside vote for, and their share."""
    shades, owner = (tensor.to(images.device) for tensor in _palette())
    inside = -F.max_pool2d(-regions[:, None].float(), 5, 1, 2)[:, 0] > 0
    inside = torch.where(inside.any(2).any(1)[:, None, None], inside, regions)
    region, row, column = inside.nonzero(as_tuple=True)
    pixels = images[region, :, row, column]  # (P, 3)
    distance, nearest = torch.cdist(pixels, shades).min(1)
    vote = torch.where(distance < COLOUR_LIMIT, owner[nearest], len(COLOURS))  # the last stands for none
    votes = torch.zeros(len(regions), len(COLOURS) + 1, device=images.device)
    votes.index_put_((region, vote), torch.ones_like(distance), accumulate=True)
    share, winner = (votes[:, :-1] / votes.sum(1, keepdim=True)).max(1)
    winners = zip(winner.tolist(), share.tolist(), strict=True)
    return [COLOURS[w] if s >= COLOUR_SHARE else None for w, s in winners], share.tolist()


# 4. Shape


@cache
def _templates(names: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Templates of the shapes at unit area about their centroids (K, WINDOW, WINDOW); area and centroid at radius 1."""
    distances = SHAPE_DISTANCES | TAUGHT_SHAPES
    axis = (torch.arange(800) + 0.5) / 400 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    window = (torch.arange(WINDOW) + 0.5) / WINDOW * 2 - 1
    wy, wx = torch.meshgrid(window, window, indexing="ij")
    masks, areas, centroids = [], [], []
    for distance in (distances[name] for name in names):
        inside = (distance(x, y) < 0).float()
        area = inside.mean() * 4
        cx, cy = (inside * x).sum() / inside.sum(), (inside * y).sum() / inside.sum()
        scale = area.sqrt()
        masks.append((0.5 - distance(wx * scale + cx, wy * scale + cy) / scale * WINDOW / 2).clamp(0, 1))
        areas.append(area)
        centroids.append(torch.stack([cx, cy]))
    return torch.stack(masks), torch.stack(areas), torch.stack(centroids)


def _shapes(
    regions: Tensor, colours: list[str | None], shares: list[float], names: tuple[str, ...]
) -> list[FoundObject]:
    """Regions (M, H, W) -> objects with their best-fitting shape."""
    templates, unit_areas, unit_centroids = (tensor.to(regions.device) for tensor in _templates(names))
    solid = regions.float()
    height, width = regions.shape[-2:]
    # Lengths are in units of the shorter side.
    down, across = ((torch.arange(side, device=regions.device) + 0.5) / SIZE for side in (height, width))
    count = solid.sum((1, 2))
    centroid = torch.stack([(solid.sum(1) * across).sum(1), (solid.sum(2) * down).sum(1)], 1) / count[:, None]
    area = count / SIZE**2
    theta = torch.zeros(len(regions), 2, 3, device=regions.device)
    frame = centroid.new_tensor([width / SIZE, height / SIZE])
    # The window reaches sqrt(area) each way; the frame spans 2.
    theta[:, 0, 0], theta[:, 1, 1] = (2 * area.sqrt() / side for side in frame)
    theta[:, :, 2] = 2 * centroid / frame - 1
    grid = F.affine_grid(theta, [len(regions), 1, WINDOW, WINDOW], align_corners=False)
    window = F.grid_sample(solid[:, None], grid, align_corners=False)  # (M, 1, WINDOW, WINDOW)
    fit = torch.minimum(window, templates).sum((2, 3)) / torch.maximum(window, templates).sum((2, 3))
    best_fit, best = fit.max(1)
    radius = (area / unit_areas[best]).sqrt()
    centre = (centroid - radius[:, None] * unit_centroids[best]) / frame
    rows = zip(
        colours, shares, best.tolist(), best_fit.tolist(), radius.tolist(), centre.tolist(), strict=True
    )
    return [
        FoundObject(
            shape=names[s] if f >= SHAPE_FIT[names[s]] and RADII[0] < r < RADII[1] else None,
            colour=c,
            size="large" if r >= LARGE else "small",
            x=x,
            y=y,
            radius=r,
            shape_fit=f,
            colour_share=share,
        )
        for c, share, s, f, r, (x, y) in rows
    ]
