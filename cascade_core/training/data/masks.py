"""Random masks for training an inpainting ControlNet: anywhere, or around a salient object of the picture."""

import torch
from torch import Tensor
from torch.nn import functional as F

GRID = 48  # cells a side, on which objects are searched for
AROUND_THINGS = 0.5  # the share of masks that surround an object, if there is one
MARGIN = 0.1  # largest distance to an object, as a share of the picture's side
SMALLEST, LARGEST = 0.002, 0.5  # sizes of an object, as shares of the picture's area


def training_masks(images: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, H, W) in {0, 1}, on the images' device: half of each kind.

    From masks at random places alone, a ControlNet learns that a hole may show a part of something larger. Objects
    painted into a hole would then reach beyond it and be cut off. The published training masks the objects that a
    saliency network finds.
    """
    anywhere = random_masks(len(images), images.shape[-2:], generator, images.device)
    around, has_thing = masks_around_things(images, generator)
    chosen = torch.rand(len(images), generator=generator).to(images.device) < AROUND_THINGS
    return torch.where((chosen & has_thing).view(-1, 1, 1), around, anywhere)


def random_masks(
    count: int,
    size: torch.Size | tuple[int, int],
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> Tensor:
    """(count, H, W) in {0, 1}: unions of up to four boxes and ellipses; one in ten masks everything outside of them,
    or everything.

    Made on the device from numbers drawn on the CPU. They cover a third on average.
    """
    height, width = size
    y = torch.linspace(0, 1, height, device=device).view(1, 1, -1, 1)
    x = torch.linspace(0, 1, width, device=device).view(1, 1, 1, -1)
    chance = torch.rand(6, count, 4, 1, 1, generator=generator).to(device)
    kind = torch.rand(count, 1, 1, generator=generator).to(device)
    centre_y, centre_x = chance[0], chance[1]
    half_y, half_x = 0.05 + 0.3 * chance[2], 0.05 + 0.3 * chance[3]
    dy, dx = (y - centre_y).abs() / half_y, (x - centre_x).abs() / half_x  # (count, 4, H, W)
    box, ellipse = torch.maximum(dy, dx) < 1, dy.square() + dx.square() < 1
    shapes = torch.where(chance[4] < 0.5, box, ellipse)
    used = torch.arange(4, device=device).view(1, 4, 1, 1) < (1 + 4 * chance[5][:, :1])  # one to four of them
    mask = (shapes & used).any(dim=1)  # (count, H, W)
    mask = torch.where(kind < 0.1, ~mask, mask)
    return torch.where(kind > 0.95, torch.ones_like(mask), mask).float()


def masks_around_things(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A box around an object of each picture, with a margin: (B, H, W) in {0, 1}, and whether there is one, bool (B,).

    Salient cells differ from the picture's median colour by over twice the mean difference (frequency-tuned saliency,
    Achanta et al. 2009, with the median in place of the mean); an object is a connected group of such cells.
    """
    batch, _, height, width = images.shape
    device = images.device
    cells = F.interpolate(images.float(), (GRID, GRID), mode="bilinear", antialias=True)
    usual = cells.flatten(2).sort(dim=2).values[..., GRID * GRID // 2]  # (B, 3)
    distance = (cells - usual[..., None, None]).square().sum(1).sqrt()  # (B, GRID, GRID)
    salient = (distance > 2 * distance.mean((1, 2), keepdim=True)).float()
    chance = 1 - torch.rand(batch, GRID * GRID, generator=generator).to(device)  # in (0, 1]
    first = (chance * salient.flatten(1)).argmax(dim=1, keepdim=True)
    begun = torch.arange(GRID * GRID, device=device) == first  # (B, GRID²)
    thing = begun.view(batch, 1, GRID, GRID).float()
    for _ in range(GRID):
        thing = F.max_pool2d(thing, 3, stride=1, padding=1) * salient[:, None]
    room = MARGIN * torch.rand(4, batch, 1, generator=generator).to(device)
    rows = _within(thing.amax(3)[:, 0], height, room[0], room[1])
    columns = _within(thing.amax(2)[:, 0], width, room[2], room[3])
    area = thing.mean((1, 2, 3))
    has_thing = (area >= SMALLEST) & (area <= LARGEST)
    return (rows[:, :, None] & columns[:, None, :]).float(), has_thing


def _within(taken: Tensor, length: int, before: Tensor, after: Tensor) -> Tensor:
    """Mask of a side's pixels from the first to the last taken cell (B, GRID), with a margin: bool (B, length)."""
    cell = torch.arange(GRID, device=taken.device)
    first = torch.where(taken > 0, cell, GRID).amin(1, keepdim=True) / GRID
    last = (torch.where(taken > 0, cell, -1).amax(1, keepdim=True) + 1) / GRID
    position = (torch.arange(length, device=taken.device) + 0.5) / length
    return (position > first - before) & (position < last + after)
