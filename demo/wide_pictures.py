"""Pictures for training decoding networks: objects of any colour and radius on any background, drawn on the
accelerator.

Compressor, Stage A and Stage B have to draw held-out pairs of shape and colour, which no training scene shows. They
learn it from a wider range of pictures, new for every batch, which still never show a held-out pair, nor a similar
colour of its shape.
"""

import torch
from torch import Generator, Tensor

from cascade_nodes.demo.scenes import GAP
from cascade_nodes.demo.shapes import OTHER_SHAPES, SHAPES, UNLIKE
from cascade_nodes.demo.world import BACKGROUND_RGB, COLOUR_RGB, DRAWN, Packed, render

MOST_OBJECTS = 4
OBJECTS = (0.04, 0.16, 0.24, 0.26, 0.30)  # shares of pictures with 0 to 4
RADIUS = (0.08, 0.24)  # of the frame's shorter side
MARGIN = 0.02
# Share of objects with a nameless shape. With fewer, decoders draw the nearest of the eight for any shape.
OTHERS = 0.3
PALETTE = 0.5  # share of objects in one of the eight colours, and of pictures on one of the five backgrounds
# Share of the other objects in a pale colour, and how far its least channel is from white: as near to white as the
# shape that is held out in white may come. Its faint outlines teach how a white one looks.
PALE, BELOW_WHITE = 0.4, (0.31, 0.6)
TRIES = 24  # colours, and places, of which the first that fits is taken; else the object is left out

# A colour in shade (0.7 of it), in light (1.1) and in highlights (two fifths of the way to white).
SHADES = (0.7, 1.1, 0.4)
NEAR = 0.25  # distance in RGB, in [0, 1], from any of these below which a colour counts as the same


def near_palette(colour: Tensor) -> Tensor:
    """Whether each colour (…, 3) is near one of the palette's: (…, 8)"""
    palette = torch.from_numpy(COLOUR_RGB).to(colour)
    dark, light, pale = (
        palette * SHADES[0],
        (palette * SHADES[1]).clamp_max(1),
        palette.lerp(palette.new_ones(3), SHADES[2]),
    )
    along_light = _from_segment(colour[..., None, :], dark, light)
    return torch.minimum(along_light, _from_segment(colour[..., None, :], palette, pale)) < NEAR


def _from_segment(point: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Distance of points (…, 3) from segments (…, 3)."""
    along = end - start
    share = ((point - start) * along).sum(-1) / along.square().sum(-1).clamp_min(1e-6)
    return (point - start - share.clamp(0, 1)[..., None] * along).norm(dim=-1)


def is_held_out(shape: Tensor, colour: Tensor) -> Tensor:
    """Whether an object is a held-out pair or similar to one. Nameless shapes that may look much like one of the eight
    count as held out if their colour is near any of the palette's.

    shape: (…) index into DRAWN; colour: (…, 3).
    """
    near = near_palette(colour)  # (…, 8)
    own = near.gather(-1, ((3 * shape + 2) % 8)[..., None])[..., 0]
    other = near.any(-1) & (shape < len(DRAWN) - len(UNLIKE))
    return torch.where(shape < len(SHAPES), own, other)


def wide_scenes(
    n: int, size: int | tuple[int, int], generator: Generator, device: torch.device | str
) -> Packed:
    """n random scenes of 0 to 4 objects that do not overlap, for frames of a size (height, width)."""
    height, width = (size, size) if isinstance(size, int) else size

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, device=device)

    def integers(most: int, *shape: int) -> Tensor:
        return torch.randint(most, shape, generator=generator, device=device)

    slots = (n, MOST_OBJECTS)
    count = torch.tensor(OBJECTS, device=device).multinomial(n, replacement=True, generator=generator)
    shape = integers(len(SHAPES), *slots)
    other = len(DRAWN) - len(OTHER_SHAPES) + integers(len(OTHER_SHAPES), *slots)
    shape = torch.where(uniform(*slots) < OTHERS, other, shape)
    angle = torch.where(shape < len(SHAPES), 0.0, uniform(*slots, high=torch.pi))
    radius = uniform(*slots, low=RADIUS[0], high=RADIUS[1])

    palette = torch.from_numpy(COLOUR_RGB).to(device)[integers(len(COLOUR_RGB), *slots, TRIES)]
    any_colour = uniform(*slots, TRIES, 3)
    least, most = any_colour.aminmax(dim=-1, keepdim=True)
    below = uniform(*slots, TRIES, 1, low=BELOW_WHITE[0], high=BELOW_WHITE[1])
    pale = 1 - below * (most - any_colour) / (most - least).clamp_min(1e-6)
    any_colour = torch.where(uniform(*slots, 1, 1) < PALE, pale, any_colour)
    colours = torch.where(uniform(*slots, 1, 1) < PALETTE, palette, any_colour)
    colour, coloured = _first(colours, ~is_held_out(shape[..., None].expand(*slots, TRIES), colours))
    shape = torch.where(coloured & (torch.arange(MOST_OBJECTS, device=device) < count[:, None]), shape, -1)

    extent = radius.new_tensor([width, height]) / min(height, width)
    edge = radius[..., None, None] + MARGIN
    places = edge + (extent - 2 * edge) * uniform(*slots, TRIES, 2)
    centre = torch.zeros(*slots, 2, device=device)
    for slot in range(MOST_OBJECTS):
        apart = (places[:, slot, :, None] - centre[:, None, :slot]).abs().amax(-1)  # (n, TRIES, slot)
        least = radius[:, None, :slot] + radius[:, slot, None, None] + GAP / 2
        free = ((apart >= least) | (shape[:, None, :slot] < 0)).all(-1)
        centre[:, slot], placed = _first(places[:, slot], free)
        shape[:, slot] = torch.where(placed, shape[:, slot], -1)

    known = torch.from_numpy(BACKGROUND_RGB).to(device)[integers(len(BACKGROUND_RGB), n)]
    any_top = uniform(n, 1, 3)
    any_ground = torch.cat([any_top, (any_top + uniform(n, 1, 3, low=-0.25, high=0.25)).clamp(0, 1)], 1)
    background = torch.where(uniform(n, 1, 1) < PALETTE, known, any_ground)
    return Packed(shape, colour, centre / extent, radius, background, angle)


def _first(candidates: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The first candidate (…, TRIES, C) that is right (…, TRIES), and whether there is one."""
    index = (
        right.to(torch.uint8).argmax(-1)[..., None, None].expand(*right.shape[:-1], 1, candidates.shape[-1])
    )
    return candidates.gather(-2, index)[..., 0, :], right.any(-1)


def wide_pictures(
    n: int, size: int | tuple[int, int], generator: Generator, device: torch.device | str, chunk: int = 256
) -> Tensor:
    """n pictures (n, 3, height, width), uint8, of `wide_scenes`; generator: on the same device."""
    return render(wide_scenes(n, size, generator, device), size, device, chunk)
