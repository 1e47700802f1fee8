"""Losses of the demo's networks. Images are (B, 3, H, W) in [0, 1]; every loss is a scalar."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cascade_nodes.cascade_core.diffusion.loss_weights import debiased
from cascade_nodes.cascade_core.diffusion.schedule import alpha_sigma, log_snr, noise_cond, per_image
from cascade_nodes.cascade_core.networks.stage_a import StageA

OUTLINE = 5  # pixels of the window in which outlines are searched for
# Ranges of a colour within the window: up to the first it is shading, from the second on it counts as a full outline.
SHADING, FULL_CONTRAST = 0.15, 0.25
# Range between a saturated colour and a light ground. Fainter outlines weigh more by its square, as their squared error
# is smaller by the square, up to a largest factor.
STRONG_CONTRAST, FAINT = 0.75, 6.0
USUAL_SHARE = 0.08  # of outlines in a picture
STRENGTH, MOST = 4.0, 3.0  # added weight of outlines; its largest factor, for pictures with few outlines
# Pixels along the frame, and their weight, in corners once more: there a network sees a picture on one side alone.
FRAME, FRAME_WEIGHT = 4, 3.0
DIFFERENCES = 1.0  # weight of the error of differences between neighbouring pixels


@torch.no_grad()
def outline_weights(image: Tensor, size: Sequence[int]) -> Tensor:
    """Weights (B, 1, *size) that stress outlines, more so where they are faint or few: white and small objects.

    At the outline of a white object on a light ground the wrong shape is a small error.
    """
    padded = F.pad(image.float(), (OUTLINE // 2,) * 4, mode="replicate")
    spread = F.max_pool2d(padded, OUTLINE, 1) + F.max_pool2d(-padded, OUTLINE, 1)  # (B, 3, H, W)
    contrast = spread.amax(1, keepdim=True)
    outline = ((contrast - SHADING) / (FULL_CONTRAST - SHADING)).clamp(0, 1)
    outline = outline * (STRONG_CONTRAST / contrast.clamp(min=SHADING)).square().clamp(1, FAINT)
    outline = F.interpolate(outline, tuple(size), mode="bilinear", antialias=True)
    share = outline.mean(dim=(2, 3), keepdim=True)
    return 1 + STRENGTH * outline * (USUAL_SHARE / share.clamp(min=1e-3)).clamp(0.5, MOST)


def weighted_mse(image: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean of the squared error by weights (B, 1, H, W)."""
    return ((image.float() - target).square() * weight).mean()


def frame_weights(size: Sequence[int], device: torch.device) -> Tensor:
    """Weights (1, 1, *size) that stress the outermost pixels, and most of all the corners."""
    sides = []
    for length in size:
        side = torch.ones(length, device=device)
        side[:FRAME] = side[-FRAME:] = FRAME_WEIGHT
        sides.append(side)
    return torch.outer(*sides)[None, None]


def differences_error(image: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean squared error of the differences between neighbours, down and across, by weights (B, 1, H, W)."""
    error = image.float() - target
    down, across = error.diff(dim=-2), error.diff(dim=-1)
    return (down.square() * weight[..., 1:, :]).mean() + (across.square() * weight[..., 1:]).mean()


def stage_a_loss(
    model: StageA, image: Tensor, noise: Tensor, quantised_share: float = 0.25
) -> dict[str, Tensor]:
    """Reconstruction through the codebook for some of the batch, through a noisy latent for the others.

    Stage B's latents reach the decoder without quantisation, so it must read both.
    noise: added to the latents, (B, c_latent, H/4, W/4); not used for the first, quantised rows. Codebook and
    commitment terms: van den Oord et al. 2017, arXiv 1711.00937.
    """
    latent = model.encode(image)  # (B, c_latent, H/4, W/4)
    count = max(round(quantised_share * len(image)), 1)
    through_codebook = latent[:count]
    quantised, _ = model.quantize(through_codebook)
    codebook = F.mse_loss(quantised, through_codebook.detach())
    commitment = F.mse_loss(through_codebook, quantised.detach())
    straight_through = through_codebook + (quantised - through_codebook).detach()
    decoded = model.decode(torch.cat([straight_through, latent[count:] + noise[count:]]))
    pixels = F.mse_loss(decoded, image)
    size = image.shape[-2:]
    weight = outline_weights(image, size) * frame_weights(size, image.device)
    error = weighted_mse(decoded, image, weight) + DIFFERENCES * differences_error(decoded, image, weight)
    absolute = ((decoded.float() - image).abs() * weight).mean()
    # A small commitment term: the encoder follows the pixels, and only a quarter of the images are quantised.
    loss = error + 0.02 * absolute + 0.1 * codebook + 0.002 * commitment
    return {"loss": loss, "pixels": pixels, "codebook": codebook}


def contrastive_loss(image: Tensor, text: Tensor, wrong: Tensor, log_scale: Tensor) -> dict[str, Tensor]:
    """CLIP's loss (Radford et al. 2021, arXiv 2103.00020) with each image's own wrong captions added.

    image, text: (B, E); wrong: (B, N, E), captions with the same words that are false of the image. Without them a
    text encoder learns a bag of words (Yuksekgonul et al. 2023, arXiv 2210.01936).
    """
    image, text, wrong = (F.normalize(value.float(), dim=-1) for value in (image, text, wrong))
    scale = log_scale.exp().clamp(max=100)
    matching = scale * image @ text.T  # (B, B)
    own_wrong = scale * torch.einsum("be,bne->bn", image, wrong)  # (B, N)
    target = torch.arange(len(image), device=image.device)
    images_loss = F.cross_entropy(torch.cat([matching, own_wrong], dim=1), target)
    texts_loss = F.cross_entropy(matching.T, target)
    hard = (matching.diagonal()[:, None] > own_wrong).float().mean()
    return {"loss": (images_loss + texts_loss) / 2, "right_over_wrong": hard}


def share_right(image: Tensor, right: Tensor, wrong: Tensor, counted: Tensor) -> Tensor:
    """Share of the counted images (B, E) that are nearer to the right text than to the wrong one. counted: (B,)"""
    image, right, wrong = (F.normalize(value.float(), dim=-1) for value in (image, right, wrong))
    nearer = (image * right).sum(1) > (image * wrong).sum(1)
    return (nearer & counted).sum() / counted.sum().clamp(min=1)


class NoiseLevels:
    """The training times of `diffusion_loss` as a table on the accelerator, so that drawing does not synchronise.

    As there, the weight is 1/√SNR, cut at `max_loss_weight`, and `pure_noise_share` of a batch is pure noise.
    """

    def __init__(self, device: torch.device, max_loss_weight: float = 16.0, pure_noise_share: float = 0.05):
        self.pure_noise_share = pure_noise_share
        level = log_snr(torch.linspace(0.001, 1, 4096))
        a, b = alpha_sigma(level)
        weight = debiased(level).clamp(max=max_loss_weight)
        self.table = torch.stack([a, b, noise_cond(level), weight]).to(device)  # (4, times)

    def noise(self, x0: Tensor) -> list[Tensor]:
        """Latents x0 (B, C, h, w) -> noised latents, noise conditions (B,), epsilon, weights (B,)"""
        times = torch.randint(self.table.shape[1], (len(x0),), device=x0.device)
        times[: int(self.pure_noise_share * len(x0))] = self.table.shape[1] - 1
        a, b, condition, weight = self.table[:, times]
        epsilon = torch.randn_like(x0)
        return [per_image(a, x0) * x0 + per_image(b, x0) * epsilon, condition, epsilon, weight]


def epsilon_loss(
    predicted: Tensor, epsilon: Tensor, weight: Tensor, places: Tensor | None = None
) -> dict[str, Tensor]:
    """Weighted error of predicted noise (B, C, h, w).  weight: (B,); places: (B, 1, h, w), weights of positions"""
    squares = (predicted.float() - epsilon).square()
    error = squares.mean(dim=(1, 2, 3))  # (B,)
    placed = error if places is None else (squares * places).mean(dim=(1, 2, 3))
    return {"loss": (placed * weight).mean(), "epsilon": error.mean()}
