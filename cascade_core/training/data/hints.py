"""Makes the hint of each kind of ControlNet from a training picture; random choices come from a generator."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import CascadeError
from ...geometry import COMPRESSOR_STRIDE, STAGE_C_COMPRESSION
from ...hints.canny import canny
from ...hints.filters import identity_map, inpaint_hint, shrink, super_resolution_hint
from ...hints.kinds import KindName
from ..settings import ControlNetSettings, Reads
from .masks import training_masks

Compress = Callable[[Tensor], Tensor]
# (B, 3, H, W) in [0, 1] -> of each picture embeddings (N, 512) and boxes (N, 4): left, top, right, bottom in pixels
FindFaces = Callable[[Tensor], Iterable[tuple[Tensor, Tensor]]]
CANNY_SIZE = 224  # published
WHOLE_FACE = 0.3  # published: the share of single faces whose embedding fills the whole map


@dataclass(frozen=True)
class Tools:
    """Networks and functions that some hints need besides the picture."""

    compress: Compress | None = None
    find_faces: FindFaces | None = None


# (images (B, 3, H, W) in [0, 1], generator, tools) -> (B, C, …)
MakeHint = Callable[[Tensor, torch.Generator, Tools], Tensor]


def _canny(images: Tensor, generator: torch.Generator, tools: Tools) -> Tensor:
    """Edges as by `canny_hint`, but resized on the images' device, which may round differently."""
    pixels = F.interpolate(images, (CANNY_SIZE, CANNY_SIZE), mode="bilinear")
    edges = canny(pixels.mul(255).clamp(0, 255).to(torch.uint8), 100, 200).float()
    return F.interpolate(edges, images.shape[-2:], mode="bilinear")


def _inpainting(images: Tensor, generator: torch.Generator, tools: Tools) -> Tensor:
    return inpaint_hint(images, training_masks(images, generator))


def _super_resolution(
    images: Tensor,
    generator: torch.Generator,
    tools: Tools,
    scale: float = 2.0,
    reads: Reads = "small",
) -> Tensor:
    if tools.compress is None:
        raise CascadeError("The super-resolution hint needs the compressor; name it in models.compressor.")
    height, width = images.shape[-2:]
    if reads == "enlarged":
        small = _small_and_back(images, scale)
    else:
        small = shrink(images, round(scale))
        # The small picture's sides must be multiples of the compressor's stride as well.
        sides = tuple(
            max(round(side / scale) // COMPRESSOR_STRIDE, 1) * COMPRESSOR_STRIDE for side in (height, width)
        )
        if small.shape[-2:] != sides:
            small = F.interpolate(small, sides, mode="bilinear", antialias=True)
    with torch.no_grad():
        return super_resolution_hint(tools.compress, small, _latent_size(images))


def _latent_size(images: Tensor) -> tuple[int, int]:
    """(h, w) of Stage C's latent of pictures of the compressor's size."""
    return images.shape[-2] // COMPRESSOR_STRIDE, images.shape[-1] // COMPRESSOR_STRIDE


def _small_and_back(images: Tensor, scale: float) -> Tensor:
    """Pictures (B, 3, H, W) of the compressor's size, shrunk and enlarged to H × W again as the hint's node does."""
    # The picture itself has 42.67 pixels for each of the compressor's 32.
    sides = [
        max(round(side / COMPRESSOR_STRIDE * STAGE_C_COMPRESSION / scale), 1) for side in images.shape[-2:]
    ]
    small = F.interpolate(images, sides, mode="bicubic", antialias=True).clamp(0, 1)
    return F.interpolate(small, images.shape[-2:], mode="bicubic", antialias=True).clamp(0, 1)


def _identity(images: Tensor, generator: torch.Generator, tools: Tools) -> Tensor:
    if tools.find_faces is None:
        raise CascadeError("The identity hint needs something that finds faces; train it by `cascade train`.")
    height, width = images.shape[-2:]
    maps = []
    for embeddings, boxes in tools.find_faces(images):
        whole = torch.rand((), generator=generator) < WHOLE_FACE
        if len(boxes) == 1 and whole:
            boxes = torch.tensor([[0.0, 0.0, width, height]])
        maps.append(identity_map(embeddings, boxes, (height, width), _latent_size(images)))
    return torch.cat(maps).to(images.device)


def hint_maker(settings: ControlNetSettings) -> MakeHint:
    """The function that makes the hint that a run's settings ask for."""
    if settings.hint == "super_resolution":
        return partial(_super_resolution, scale=settings.scale, reads=settings.reads)
    return MAKERS[settings.hint]


MAKERS: dict[KindName, MakeHint] = {
    "canny": _canny,
    "inpainting": _inpainting,
    "super_resolution": _super_resolution,
    "identity": _identity,
}
