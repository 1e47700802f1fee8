"""The hints of the published inpainting, super-resolution and identity ControlNets; `canny.py` has the fourth.

The conventions are those of the published code's filters, `modules/controlnet.py`: pictures are RGB in [0, 1], not
normalised, and a map has one position for each of Stage C's latent.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import CascadeError
from ..geometry import COMPRESSOR_STRIDE
from ..pictures import resized

READS = ("small", "enlarged")  # the picture that a super-resolution ControlNet was trained to read
SR_SCALE = 2  # published: the small picture has half the side of the large one


def inpaint_hint(images: Tensor, mask: Tensor, threshold: float = 0.5) -> Tensor:
    """The picture with its masked area white, and the mask as fourth channel (published `InpaintFilter`).

    images: (B, 3, H, W) in [0, 1]; mask: (B or 1, h, w) or (B or 1, 1, h, w), masked where above `threshold`;
    another size is brought to the picture's -> (B, 4, H, W) float32, its mask 0 or 1.
    """
    _check_pictures(images, "The inpainting hint")
    masked = mask_of(mask, len(images), (images.shape[-2], images.shape[-1])).to(images.device) > threshold
    white = torch.where(masked, 1.0, images.float())  # (B, 3, H, W)
    return torch.cat([white, masked.float()], dim=1)


def mask_of(mask: Tensor, batch: int, size: tuple[int, int]) -> Tensor:
    """A mask (B or 1, h, w) or (B or 1, 1, h, w) as (batch, 1, H, W) float32, for pictures of H × W pixels."""
    if mask.dim() not in (3, 4) or (mask.dim() == 4 and mask.shape[1] != 1) or 0 in mask.shape:
        raise CascadeError(
            f"The mask has the shape {tuple(mask.shape)}, but (batch, height, width) was expected; connect a MASK."
        )
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    if len(mask) not in (1, batch):
        raise CascadeError(
            f"{len(mask)} masks came with {batch} pictures; give one mask, or one for each picture."
        )
    if mask.shape[-2:] != size:
        mask = F.interpolate(mask, size=size, mode="bilinear")
    return mask.expand(batch, -1, -1, -1)


def super_resolution_hint(
    compress: Callable[[Tensor], Tensor], small: Tensor, size: tuple[int, int]
) -> Tensor:
    """The compressor's latent of a small picture, each position repeated (published `SREffnetFilter`).

    compress: (B, 3, H, W) in [0, 1] -> (B, 16, H / 32, W / 32), the compressor; small: (B, 3, H, W), sides
    multiples of 32; size: (h, w) of the large picture's latent -> (B, 16, h, w).
    """
    _check_pictures(small, "The super-resolution hint")
    if small.shape[-2] % COMPRESSOR_STRIDE or small.shape[-1] % COMPRESSOR_STRIDE:
        raise CascadeError(
            f"The super-resolution hint got a picture of {small.shape[-1]} × {small.shape[-2]} pixels, but the "
            f"compressor takes multiples of {COMPRESSOR_STRIDE}; resize it."
        )
    return F.interpolate(compress(small), size=size, mode="nearest-exact")


def super_resolution_input(pictures: Tensor, size: tuple[int, int], scale: float) -> Tensor:
    """The small picture as the compressor reads it for `super_resolution_hint`.

    pictures: (B, H, W, 3) in [0, 1]; size: (h, w) of the large picture's latent; scale: how many times smaller a side
    of the small picture is; 1 where the ControlNet was trained to read it enlarged -> (B, 3, 32 · h / scale, …)
    """
    pixels = [max(round(side / scale), 1) * COMPRESSOR_STRIDE for side in size]
    return resized(pictures, pixels).movedim(-1, 1)


def shrink(images: Tensor, scale: int = SR_SCALE) -> Tensor:
    """Every `scale`-th pixel: how the published training made small pictures.  (B, C, H, W) -> (B, C, H/s, W/s)"""
    return images[..., ::scale, ::scale]


def identity_map(
    embeddings: Tensor, boxes: Tensor, picture: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Map of each face's embedding, of length 1, inside its box; zero elsewhere (published `IdentityFilter`).

    embeddings: (N, C), C = 512 for ArcFace's; boxes: (N, 4), left, top, right, bottom in pixels of a picture of
    (height, width) = `picture`; size: (h, w) of Stage C's latent -> (1, C, h, w) float32.  A box covers at least
    one position; of two, the later face is on top.  A box of the whole picture puts one face everywhere, as was
    done to 30 % of the published training's single faces.
    """
    if embeddings.dim() != 2 or tuple(boxes.shape) != (len(embeddings), 4):
        raise CascadeError(
            f"The identity map got embeddings {tuple(embeddings.shape)} and boxes {tuple(boxes.shape)}, but expects "
            "(faces, 512) and (faces, 4): left, top, right and bottom of each face."
        )
    if not bool(torch.isfinite(embeddings).all()):
        raise CascadeError(
            "The identity map got an embedding that holds NaN or infinity; encode the face anew."
        )
    height, width = size
    result = torch.zeros(1, embeddings.shape[1], height, width, device=embeddings.device)
    scale = torch.tensor([width / picture[1], height / picture[0]] * 2)
    # Published: boxes in whole pixels of a picture that has 32 pixels per position.
    positions = (
        ((boxes.cpu().float() * scale * COMPRESSOR_STRIDE).int() / COMPRESSOR_STRIDE)
        .clamp(min=0)
        .round()
        .int()
    )
    for embedding, (left, top, right, bottom) in zip(embeddings.float(), positions.tolist(), strict=True):
        left, top = min(left, width - 1), min(top, height - 1)
        right, bottom = max(right, left + 1), max(bottom, top + 1)
        result[0, :, top:bottom, left:right] = F.normalize(embedding, dim=0)[:, None, None]
    return result


def _check_pictures(images: Tensor, hint: str) -> None:
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise CascadeError(
            f"{hint} got images of shape {tuple(images.shape)}, {images.dtype}, but expects RGB images (B, 3, H, W) "
            "as floats in [0, 1]; convert them first."
        )
