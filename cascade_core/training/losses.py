"""What each network is trained for. Images are (B, 3, H, W) in [0, 1]; every loss is a scalar."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from ..diffusion.forward_process import diffuse, random_t
from ..diffusion.loss_weights import AdaptiveLossWeight, debiased
from ..diffusion.schedule import alpha_sigma, log_snr, log_snr_limits, noise_cond, per_image, undiffuse
from ..networks.stage_a import StageA


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


def diffusion_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    largest_weight: float | None = 16.0,
    share_at_start: float = 0.05,
    loss_weight: Callable[..., Tensor] = debiased,
    shift: float = 1.0,
) -> dict[str, Tensor]:
    """Weighted error of the predicted noise: predict(noised, noise_cond) against epsilon.

    Every run starts from pure noise, where an error in epsilon is an error in x0 a hundred times as large; so the
    default weight is the debiased one, cut at `largest_weight`, and a share of the batch is taken at t = 1 itself. The
    published training has neither: p2, no cut, no share. An AdaptiveLossWeight is told the errors.
    """
    t = random_t(len(x0)).to(x0.device)
    t[: int(share_at_start * len(x0))] = 1.0
    diffused = diffuse(x0, torch.randn_like(x0), t, shift, loss_weight)
    prediction = predict(diffused.noised, diffused.noise_cond).float()
    error = (prediction - diffused.target).square().mean(dim=(1, 2, 3))  # (B,)
    if isinstance(loss_weight, AdaptiveLossWeight):
        loss_weight.update_buckets(diffused.log_snr, error.detach())
    return {"loss": (error * _cut(diffused.loss_weight, largest_weight)).mean(), "epsilon": error.mean()}


def consistency_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    teacher: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    steps: int = 50,
    largest_weight: float | None = 16.0,
    share_at_start: float = 0.05,
    loss_weight: Callable[..., Tensor] = debiased,
    shift: float = 1.0,
    places: int | None = None,
    own: float = 0.0,
) -> dict[str, Tensor]:
    """Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378 and 2311.05556).

    The teacher's path is cut into `steps`. Wherever it stands at the end of one, the student shall see the end that it
    sees one step further on; with `places`, it stands where as many steps of the `lcm` sampler do, and nowhere else
    (Heek et al. 2024, arXiv 2403.06807): fewer things to learn, and what it says of pure noise is handed on from the
    teacher in `places` jumps instead of `steps`.
    teacher: the guided prediction, (noised, noise_cond) -> epsilon. The student's x0 is what `lcm` takes from it, with
    no skip connection, so that at the end of the path it is the teacher's own. The target comes from the student as it
    is, without gradient (Song & Dhariwal 2023, arXiv 2310.14189, section 3.2).
    The error is weighed as in `diffusion_loss`, as an error in epsilon.
    own: the share of the batch that stands where the student's own step of `lcm` leads, from one place back, instead of
    on the way from a picture (Kohler et al. 2024, arXiv 2405.05224): it then learns to mend what it does itself.
    """
    places = places or steps
    number = torch.randint(1, places + 1, (len(x0),))
    number[: int(share_at_start * len(x0))] = places
    if own:
        x0 = _own_view(predict, x0, number, places, own, shift)
    within = steps // places  # steps of a jump
    times = [(number - i / within) / places for i in range(within)] + [(number - 1) / places]
    levels = [log_snr(time, shift).to(x0.device) for time in times]
    here, there = levels[0], levels[-1]
    a, b = (per_image(value, x0) for value in alpha_sigma(here))
    x = a * x0 + b * torch.randn_like(x0)
    with torch.no_grad():
        x_next, end = along_path(teacher, x, levels)
        seen = undiffuse(x_next, there, predict(x_next, noise_cond(there)).float())
        end = torch.where(per_image(number == 1, x0).to(x0.device), end, seen)
        target = (x - a * end) / b
    error = (predict(x, noise_cond(here)).float() - target).square().mean(dim=(1, 2, 3))  # (B,)
    return {"loss": (error * _cut(loss_weight(here), largest_weight)).mean(), "epsilon": error.mean()}


@torch.no_grad()
def _own_view(
    predict: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    number: Tensor,
    places: int,
    share: float,
    shift: float,
) -> Tensor:
    """x0, of the batch's last share what the student sees of it one place nearer to the noise, where there is one."""
    level = log_snr((number + 1).clamp(max=places) / places, shift).to(x0.device)
    a, b = (per_image(value, x0) for value in alpha_sigma(level))
    x = a * x0 + b * torch.randn_like(x0)
    seen = undiffuse(x, level, predict(x, noise_cond(level)).float())
    chosen = (torch.arange(len(x0)) >= (1 - share) * len(x0)) & (number < places)
    return torch.where(per_image(chosen, x0).to(x0.device), seen, x0)


def along_path(
    teacher: Callable[[Tensor, Tensor], Tensor], x: Tensor, levels: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Where the teacher's path from x leads, and the x0 that its last step saw; each image has levels (B,) of its own.

    The steps of the `dpmpp_2m` sampler: the first, and one that ends in the clean picture, are of first order.
    """
    clean = log_snr_limits()[1]
    x0 = before = x  # replaced in the first step
    for i, (here, there) in enumerate(pairwise(levels)):
        before, x0 = x0, undiffuse(x, here, teacher(x, noise_cond(here)))
        data = x0
        if i:
            ratio = (there - here) / (2 * (here - levels[i - 1]))
            data = x0 + per_image(torch.where(there < clean, ratio, 0.0), x) * (x0 - before)
        (a, b), (a_next, b_next) = ([per_image(v, x) for v in alpha_sigma(level)] for level in (here, there))
        x = b_next / b * x + (a_next - a * b_next / b) * data
    return x, x0


def _cut(weight: Tensor, largest: float | None) -> Tensor:
    return weight if largest is None else weight.clamp(max=largest)


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
