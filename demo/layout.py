"""What a picture shows, as numbers: which objects, where, how large, on what.

Contrast of captions with pictures leaves a text encoder a bag of words for thousands of steps: which of two objects is
on the left decides too little of that loss. Trained on the layout directly, it learns this in a minute. In the same
way a small star and a small cross are nearly the same picture to an image encoder, until it is asked which shape is
where.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cascade_nodes.demo.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, SceneTable
from cascade_nodes.demo.world import Packed

KINDS = len(SHAPES) * len(COLOURS)
PLACE_SHARE = 30.0  # of the squared error of places, which are fractions of the frame
HIDDEN = 512

GRID = 8  # cells across and down a picture, of which no two objects share one
NAMELESS, NOTHING = len(SHAPES), len(SHAPES) + 1  # in a cell, after the eight shapes
VALUES = 6  # of an object in its cell: colour, place in the cell, radius in cells
VALUES_SHARE = 10.0  # of their squared error


class Layout(NamedTuple):
    """The objects of N scenes."""

    kind: Tensor  # (N, slots) int64: shape * 8 + colour; -1: no object
    large: Tensor  # (N, slots) float32: 1 where it is
    centre: Tensor  # (N, slots, 2) float32: (x, y), fractions of the frame
    background: Tensor  # (N,) int64, index into BACKGROUNDS


def layout_of(scenes: SceneTable, device: torch.device) -> Layout:
    large = (scenes.size == SIZES.index("large")).astype("float32")
    columns = scenes.kind, large, scenes.centre.astype("float32"), scenes.background
    return Layout(*(torch.from_numpy(column).to(device) for column in columns))


class LayoutReader(nn.Module):
    """Reads the layout from pooled text.  (N, width) -> of each kind of object whether it is there (N, 64), where
    (N, 64, 2), whether large (N, 64), and the backgrounds' logits (N, 5).
    """

    def __init__(self, width: int):
        super().__init__()
        outputs = 4 * KINDS + len(BACKGROUNDS)
        self.layers = nn.Sequential(nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, outputs))

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values = self.layers(pooled).float()
        objects, background = values[:, : 4 * KINDS].unflatten(1, (KINDS, 4)), values[:, 4 * KINDS :]
        return objects[..., 0], objects[..., 1:3] + 0.5, objects[..., 3], background


def place_error(places: Tensor, layout: Layout) -> Tensor:
    """Squared distance of places (N, 64, 2) from where the objects are, as a mean over each scene's: (N,)"""
    there = layout.kind >= 0
    read = places.gather(1, layout.kind.clamp(min=0)[..., None].expand(-1, -1, 2))  # (N, slots, 2)
    squares = (read - layout.centre).square().sum(-1) * there
    return squares.sum(1) / there.sum(1).clamp(min=1)


def layout_loss(read: tuple[Tensor, Tensor, Tensor, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Loss of layouts read from captions; where a caption leaves something out, the average is the best answer."""
    present, places, large, background = read
    there = layout.kind >= 0
    slots = layout.kind.clamp(min=0)
    target = torch.zeros_like(present).scatter_reduce(1, slots, there.float(), "amax")
    objects = F.binary_cross_entropy_with_logits(present, target, reduction="none").sum(1).mean()
    sizes = F.binary_cross_entropy_with_logits(large.gather(1, slots), layout.large, reduction="none")
    sizes = (sizes * there).sum() / there.sum()
    place = place_error(places, layout).mean()
    ground = F.cross_entropy(background, layout.background)
    return {
        "loss": objects + sizes + ground + PLACE_SHARE * place,
        "objects": objects,
        "sizes": sizes,
        "places": place,
        "backgrounds": ground,
    }


class Cells(NamedTuple):
    """What stands in the cells of a grid over square pictures."""

    shape: Tensor  # (N, GRID, GRID) uint8, index into SHAPES, NAMELESS or NOTHING
    values: Tensor  # (N, GRID, GRID, VALUES) float32; 0 where there is nothing
    background: Tensor  # (N, 6) float32: the colours at the top and the bottom


def cells_of(scenes: Packed) -> Cells:
    there = scenes.shape >= 0
    place = scenes.centre * GRID  # (N, slots, 2), in cells from the top left
    cell = place.long().clamp(0, GRID - 1)
    values = torch.cat([scenes.colour, place - cell, GRID * scenes.radius[..., None]], -1)
    row, slot = there.nonzero(as_tuple=True)
    x, y = cell[row, slot].unbind(-1)
    shape = torch.full((len(there), GRID, GRID), NOTHING, dtype=torch.uint8, device=there.device)
    shape[row, y, x] = scenes.shape[row, slot].clamp(max=NAMELESS).to(torch.uint8)
    in_cells = torch.zeros(len(there), GRID, GRID, VALUES, device=there.device)
    in_cells[row, y, x] = values[row, slot]
    return Cells(shape, in_cells, scenes.background.flatten(1))


class CellReader(nn.Module):
    """Reads the cells from pictures' embeddings.  (N, width) -> logits of shapes (N, NOTHING + 1, GRID, GRID), values
    (N, GRID, GRID, VALUES), backgrounds (N, 6).
    """

    def __init__(self, width: int):
        super().__init__()
        outputs = GRID * GRID * (NOTHING + 1 + VALUES) + 6
        self.layers = nn.Sequential(nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, outputs))

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        read = self.layers(embedding).float()
        cells = read[:, :-6].unflatten(1, (GRID, GRID, NOTHING + 1 + VALUES))
        return cells[..., : NOTHING + 1].movedim(-1, 1), cells[..., NOTHING + 1 :], read[:, -6:]


def cells_loss(read: tuple[Tensor, Tensor, Tensor], cells: Cells) -> dict[str, Tensor]:
    """Loss of what was read of pictures. Cells with an object weigh as much as all empty ones."""
    logits, values, background = read
    error = F.cross_entropy(logits, cells.shape.long(), reduction="none")
    there = cells.shape != NOTHING
    count = there.sum().clamp(min=1)
    shapes, empty = (error * there).sum() / count, (error * ~there).sum() / (~there).sum()
    value = ((values - cells.values).square().mean(-1) * there).sum() / count
    ground = F.mse_loss(background, cells.background)
    right = ((logits.argmax(1) == cells.shape) & there).sum() / count
    return {
        "loss": shapes + empty + VALUES_SHARE * (value + ground),
        "shapes": shapes,
        "values": value,
        "right": right,
    }
