"""Losses of the demo's networks that predict no noise. Images are (B, 3, H, W) in [0, 1]; every loss is a scalar."""

import torch
from torch import Tensor
from torch.nn import functional as F

from cascade_nodes.cascade_core.networks.stage_a import StageA


def stage_a_loss(model: StageA, image: Tensor, noise: float = 0.05) -> dict[str, Tensor]:
    """Reconstruction through the codebook for one half of the batch, through a noisy latent for the other.

    Stage B's latents reach the decoder without quantisation, so it must read both.
    Codebook and commitment terms: van den Oord et al. 2017, arXiv 1711.00937.
    """
    latent = model.encode(image)  # (B, c_latent, H/4, W/4)
    quantised, _ = model.quantize(latent)
    codebook = F.mse_loss(quantised, latent.detach()) + 0.25 * F.mse_loss(latent, quantised.detach())
    straight_through = latent + (quantised - latent).detach()
    half = len(image) // 2
    noisy = latent + noise * torch.randn_like(latent)
    decoded = model.decode(torch.cat([straight_through[:half], noisy[half:]]))
    pixels = F.mse_loss(decoded, image)
    loss = pixels + 0.1 * F.l1_loss(decoded, image) + 0.1 * codebook
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
