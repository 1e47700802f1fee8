"""What a caption says of its picture, as numbers: which objects, where, how large, on what.

Contrast with pictures alone leaves a text encoder a bag of words for thousands of steps: which of two objects is on
the left decides too little of that loss. Trained on the layout directly, it learns this in a minute.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cascade_nodes.demo.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, SceneTable

KINDS = len(SHAPES) * len(COLOURS)
PLACE_SHARE = 30.0  # of the squared error of places, which are fractions of the frame
HIDDEN = 512


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
