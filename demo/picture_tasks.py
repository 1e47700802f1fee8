"""Measures pictures as input: variations of them, two of them mixed, and image to image."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

import torch
from torch import Tensor

from cascade_nodes.demo.captions import ObjectSpec, Spec, verbalise
from cascade_nodes.demo.dataset import as_float, pictures
from cascade_nodes.demo.evaluate import SEED, prompts_of
from cascade_nodes.demo.measuring import Figures, in_batches, psnr, rates
from cascade_nodes.demo.pipeline import PRIOR, DemoCascade, Sampling
from cascade_nodes.demo.scenes import Scene, alone, sample_scenes

VARIATION = Sampling(steps=20, cfg=3.0, sampler="dpmpp_2m")


def things(scene: Scene) -> Spec:
    """The shapes and colours of a scene, and nothing else."""
    return Spec(tuple(ObjectSpec(shape=o.shape, colour=o.colour) for o in scene.objects), exact=True)


def variation(cascade: DemoCascade, count: int) -> tuple[Figures, Tensor]:
    """Pictures as prompts without words: the same shapes and colours come back, differently for another seed.

    The pictures are new; in half of the measurement so is what they show, a pair of shape and colour or a triple that
    was never trained on.
    """

    def made(embedded: Tensor, seed: int) -> Tensor:
        def some(part: slice) -> Tensor:
            prompts = [""] * (part.stop - part.start)
            latents = cascade.prior(prompts, seed + part.start, VARIATION, images=embedded[part])
            return cascade.decode(latents, prompts, seed + part.start)

        return in_batches(some, count)

    figures: Figures = {}
    sheets = []
    for split, name in (("train", "right"), ("held_out", "right_of_what_was_never_trained")):
        scenes = sample_scenes(count, SEED + 10, split)
        sources = pictures(scenes, cascade.device)
        embedded = cascade.embed(sources)[:, None]  # (N, 1, E)
        first, second = made(embedded, SEED), made(embedded, SEED + 10_000)
        figures[name] = rates(first, [things(scene) for scene in scenes])["all_right"]
        figures[f"{name}_psnr_between_seeds_db"] = psnr(first, second).mean().item()
        sheets.append(torch.stack([as_float(sources).cpu(), first, second], dim=1).flatten(0, 1))
    return figures, torch.cat([sheet[:24] for sheet in sheets])


def mixing(cascade: DemoCascade, count: int) -> tuple[Figures, Tensor]:
    """Two pictures of one object each as one prompt: both objects are there."""
    scenes = [s for s in sample_scenes(2 * count, SEED + 11, "held_out") if len(s.objects) == 2][:count]
    sources = [pictures(alone(scenes, slot, SEED), cascade.device) for slot in (0, 1)]
    embedded = torch.stack([cascade.embed(images) for images in sources], dim=1)  # (N, 2, E)

    def some(part: slice) -> Tensor:
        prompts = [""] * (part.stop - part.start)
        latents = cascade.prior(prompts, SEED + part.start, VARIATION, images=embedded[part])
        return cascade.decode(latents, prompts, SEED + part.start)

    images = in_batches(some, len(scenes))
    figures = rates(images, [things(scene) for scene in scenes])
    one = Spec((ObjectSpec(),) * 2, exact=True)
    return {
        "both_right": figures["all_right"],
        "colours": figures["objects_colour"],
        "shapes": figures["objects_shape"],
        "two_objects": rates(images, [one] * len(scenes))["counts"],
    }, torch.stack([*(as_float(s).cpu() for s in sources), images], dim=1).flatten(0, 1)


def image_to_image(cascade: DemoCascade, count: int) -> tuple[Figures, Tensor]:
    """The smaller `denoise`, the nearer to the source; another background is taken at 0.8."""
    scenes = sample_scenes(count, SEED + 12, "held_out")
    prompts, specs = prompts_of(scenes)
    sources = pictures(scenes, cascade.device)
    rng = Random(SEED)
    grounds = [rng.choice([g for g in ("sky", "sand", "grass", "pink") if g != s.background]) for s in scenes]
    changed = [replace(spec, background=ground) for spec, ground in zip(specs, grounds, strict=True)]
    new_prompts = [verbalise(spec, rng) for spec in changed]

    def made(texts: Sequence[str], denoise: float) -> Tensor:
        def some(part: slice) -> Tensor:
            start = cascade.compress(sources[part])
            how = replace(PRIOR, denoise=denoise)
            latents = cascade.prior(texts[part], SEED + part.start, how, start=start)
            return cascade.decode(latents, texts[part], SEED + part.start)

        return in_batches(some, count)

    truth = as_float(sources).cpu()
    same = {denoise: made(prompts, denoise) for denoise in (0.2, 0.5, 0.8)}
    other = made(new_prompts, 0.8)
    return {
        **{f"psnr_at_{d}_db": psnr(images, truth).mean().item() for d, images in same.items()},
        "change_of_background_taken_at_0.8": rates(other, changed)["backgrounds"],
        "right_after_the_change": rates(other, changed)["all_right"],
    }, torch.stack([truth, *same.values(), other], dim=1).flatten(0, 1)


PICTURE_TASKS: dict[str, Callable[[DemoCascade, int], tuple[Figures, Tensor]]] = {
    "variation": variation,
    "mixing": mixing,
    "image_to_image": image_to_image,
}
