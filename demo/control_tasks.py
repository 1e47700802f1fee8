"""Measures masks and ControlNets, which guide Stage C besides words."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cascade_nodes.cascade_core.hints.canny import canny, canny_hint
from cascade_nodes.cascade_core.hints.filters import inpaint_hint, super_resolution_hint
from cascade_nodes.cascade_core.hints.masks import composite, latent_mask
from cascade_nodes.cascade_core.stages.control import AppliedControlNet, ControlNetStage
from cascade_nodes.demo.captions import ObjectSpec, Spec, verbalise
from cascade_nodes.demo.dataset import as_float, pictures, resized
from cascade_nodes.demo.evaluate import SEED, prompts_of
from cascade_nodes.demo.measuring import Figures, in_batches, psnr, rates
from cascade_nodes.demo.pipeline import DemoCascade
from cascade_nodes.demo.recipe import COMPRESSED, LATENT, PICTURE, STAGE_B_LATENT
from cascade_nodes.demo.scenes import COLOURS, SHAPES, Scene, sample_scenes

SMALL = PICTURE // 16  # pixels of the picture that super resolution enlarges
FEATHER = 8  # pixels, of the composite


def controlnet(cascade: DemoCascade, kind: str) -> ControlNetStage:
    return cascade.cascade.controlnet(f"demo_controlnet_{kind}.safetensors")


def guided(
    cascade: DemoCascade,
    stage: ControlNetStage,
    hints: Tensor,
    prompts: Sequence[str],
    strength: float = 1.0,
    **options: Any,
) -> Tensor:
    """Samples Stage C's latents with a ControlNet; hints: (B, C, H, W), one for each prompt."""
    controls = (AppliedControlNet(stage, hints, strength),) if strength else ()
    return cascade.prior(prompts, controls=controls, **options)


def edges(images: Tensor) -> Tensor:
    """(N, 3, H, W) in [0, 1] -> bool (N, 1, 224, 224), as the hint finds them, one pixel wider to each side."""
    pixels = F.interpolate(images, (224, 224), mode="bilinear").mul(255).to(torch.uint8)
    return F.max_pool2d(canny(pixels, 100, 200).float(), 3, 1, 1) > 0


def overlap(mask: Tensor, reference: Tensor) -> float:
    """Mean intersection over union of masks (N, 1, H, W)."""
    intersection, union = (mask & reference).sum((1, 2, 3)), (mask | reference).sum((1, 2, 3))
    return (intersection / union.clamp_min(1)).mean().item()


def controlnet_canny(cascade: DemoCascade, count: int) -> tuple[Figures, Tensor]:
    """Measures how closely pictures follow the edges of a held-out scene, compared with words alone."""
    scenes = sample_scenes(count, SEED + 20, "held_out")
    prompts, specs = prompts_of(scenes)
    sources = as_float(pictures(scenes, cascade.device))
    hints = canny_hint(resized(sources, COMPRESSED))
    network = controlnet(cascade, "canny")

    def sample_at(strength: float) -> Tensor:
        def sample_batch(rows: slice) -> Tensor:
            seed = SEED + rows.start
            latents = guided(cascade, network, hints[rows], prompts[rows], strength, seed=seed)
            return cascade.decode(latents, prompts[rows], seed)

        return in_batches(sample_batch, count)

    sources = sources.cpu()
    without, half, full = sample_at(0.0), sample_at(0.5), sample_at(1.0)
    source_edges = edges(sources)
    ious = {
        name: overlap(edges(images), source_edges) for name, images in (("without", without), ("with", full))
    }
    return {
        "edge_iou": ious["with"],
        "edge_iou_without": ious["without"],
        "edge_iou_ratio": ious["with"] / ious["without"],
        "edge_iou_at_half_strength": overlap(edges(half), source_edges),
        "right": rates(full, specs)["all_right"],
    }, torch.stack([sources, without, half, full], dim=1).flatten(0, 1)


def edited(scene: Scene, rng: Random) -> tuple[Scene, Tensor]:
    """Replaces the last object of a scene; returns the new scene and the mask (1, 256, 256) of the old object."""
    *unchanged, replaced = scene.objects
    while True:
        substitute = replace(replaced, shape=rng.choice(SHAPES), colour=rng.choice(COLOURS))
        if substitute.shape != replaced.shape and substitute.colour not in [o.colour for o in scene.objects]:
            break
    after = replace(scene, objects=(*unchanged, substitute))
    reach = replaced.radius + 0.035
    y = x = (torch.arange(PICTURE) + 0.5) / PICTURE
    mask = ((y[:, None] - replaced.y).abs() < reach) & ((x[None, :] - replaced.x).abs() < reach)
    return after, mask[None].float()


@torch.no_grad()
def painted(
    cascade: DemoCascade,
    stage: ControlNetStage,
    images: Tensor,
    masks: Tensor,
    prompts: Sequence[str],
    seed: int,
    strength: float = 1.0,
    grow: int = 0,
) -> Tensor:
    """Inpaints pictures (B, 3, 256, 256) where the masks (B, 256, 256) are 1, by both stages, without compositing.

    grow: positions by which Stage C's mask is wider.
    """
    small = resized(images, COMPRESSED)
    places = latent_mask(masks, len(images), LATENT[1:], grow)
    details = latent_mask(masks, len(images), STAGE_B_LATENT[1:])
    start = cascade.compressor(small)
    hints = inpaint_hint(small.cpu(), masks)
    latents = guided(cascade, stage, hints, prompts, strength, seed=seed, start=start, mask=places)
    return cascade.decode(latents, prompts, seed, source=images, mask=details)


def inpaint(cascade: DemoCascade, count: int) -> tuple[Figures, Tensor]:
    """Measures inpainting: one object is replaced by another that the prompt names; the rest stays."""
    rng = Random(SEED)
    scenes = sample_scenes(count, SEED + 21, "held_out")
    edits = [edited(scene, rng) for scene in scenes]
    masks = torch.cat([mask for _, mask in edits])  # (N, 256, 256)
    specs = [full(after) for after, _ in edits]
    prompts = [verbalise(spec, rng) for spec in specs]
    sources = pictures(scenes, cascade.device)
    network = controlnet(cascade, "inpainting")

    def inpaint_at(strength: float) -> tuple[Tensor, Tensor]:
        def sample_batch(rows: slice) -> Tensor:
            images = as_float(sources[rows])
            grow = 1 if strength else 0  # without the ControlNet a grown mask does harm
            seed = SEED + rows.start
            return painted(cascade, network, images, masks[rows], prompts[rows], seed, strength, grow)

        raw = in_batches(sample_batch, count)
        return raw, composite(raw, as_float(sources).cpu(), masks[:, None], FEATHER)

    truth = as_float(sources).cpu()
    outside = masks[:, None] == 0
    raw, done = inpaint_at(1.0)
    _, plain = inpaint_at(0.0)

    objects = [Spec((spec.objects[-1],)) for spec in specs]
    return {
        "inside_right": rates(done, objects)["all_right"],
        "right_in_everything": rates(done, specs)["all_right"],
        "inside_right_without_controlnet": rates(plain, objects)["all_right"],
        "outside_psnr_db_before_compositing": psnr(raw, truth, outside).mean().item(),
        "outside_psnr_db": psnr(done, truth, outside).mean().item(),
    }, torch.stack([truth, torch.where(outside, truth, torch.ones(())), plain, done], dim=1).flatten(0, 1)


def full(scene: Scene) -> Spec:
    """Spec of a prompt for inpainting: everything but the sizes."""
    objects = tuple(ObjectSpec(o.shape, o.colour) for o in scene.objects)
    return Spec(objects, scene.relation, scene.background, exact=True)


def outpaint(cascade: DemoCascade, count: int) -> tuple[Figures, Tensor]:
    """Measures outpainting: half of a picture of one object is made anew, with a second object in the prompt."""
    scenes = [
        scene
        for scene in sample_scenes(12 * count, SEED + 23, "held_out")
        if len(scene.objects) == 2 and _splits(scene)
    ][:count]
    specs = [full(scene) for scene in scenes]
    rng = Random(SEED)
    prompts = [verbalise(spec, rng) for spec in specs]
    sources = pictures(scenes, cascade.device)
    masks = torch.stack([_half(scene) for scene in scenes])
    network = controlnet(cascade, "inpainting")

    def sample_batch(rows: slice) -> Tensor:
        images = torch.where(masks[rows, None].to(cascade.device) > 0, 0.5, as_float(sources[rows]))
        return painted(cascade, network, images, masks[rows], prompts[rows], SEED + rows.start)

    truth = as_float(sources).cpu()
    done = composite(in_batches(sample_batch, len(scenes)), truth, masks[:, None], FEATHER)
    added_objects = [Spec((spec.objects[1],)) for spec in specs]
    return {
        "new_object_right": rates(done, added_objects)["all_right"],
        "right_in_everything": rates(done, specs)["all_right"],
    }, torch.stack([torch.where(masks[:, None] > 0, torch.ones(()), truth), done], dim=1).flatten(0, 1)


def _splits(scene: Scene) -> bool:
    """Whether a line through the middle separates the two objects."""
    first, second = scene.objects
    along = (first.x, second.x) if scene.relation in ("left", "right") else (first.y, second.y)
    nearer, further = (first, second) if along[0] < along[1] else (second, first)
    return min(along) + nearer.radius < 0.46 and max(along) - further.radius > 0.54


def _half(scene: Scene) -> Tensor:
    """Mask (256, 256) of the half of the picture in which the second object stands."""
    position = (torch.arange(PICTURE) + 0.5) / PICTURE
    upper = scene.relation in ("right", "below")  # the second object is left of or above the first
    line = (position < 0.5 if upper else position > 0.5).float()
    return (
        line.expand(PICTURE, PICTURE)
        if scene.relation in ("left", "right")
        else line[:, None].expand(-1, PICTURE)
    )


def super_resolution(cascade: DemoCascade, count: int) -> tuple[Figures, Tensor]:
    """Measures super resolution from 16 to 256 pixels against bicubic: everywhere, and at the outlines.

    The cascade's reconstruction from the true picture's own latents is the upper bound for a ControlNet.
    """
    scenes = sample_scenes(count, SEED + 22, "held_out")
    prompts, specs = prompts_of(scenes)
    sources = pictures(scenes, cascade.device)
    images = as_float(sources)
    small = resized(images, SMALL)
    network = controlnet(cascade, "super_resolution")
    enlarged = resized(small, PICTURE)
    with torch.no_grad():
        hints = super_resolution_hint(cascade.compressor, resized(small, COMPRESSED), (6, 6))

    def upscale(texts: Sequence[str]) -> Tensor:
        def sample_batch(rows: slice) -> Tensor:
            seed = SEED + rows.start
            latents = guided(cascade, network, hints[rows], texts[rows], seed=seed)
            return cascade.decode(latents, texts[rows], seed)

        return in_batches(sample_batch, count)

    truth, enlarged = images.cpu(), enlarged.cpu()
    done, untold = upscale(prompts), upscale([""] * count)
    best = in_batches(lambda rows: cascade.reconstruct(sources[rows], SEED + rows.start), count)
    outline = edges(truth).float()
    outline = F.interpolate(outline, (PICTURE, PICTURE), mode="nearest") > 0

    sharp = sharpness(truth, outline)
    return {
        "sharpness_db": (sharpness(done, outline) - sharp).mean().item(),
        "sharpness_db_bicubic": (sharpness(enlarged, outline) - sharp).mean().item(),
        "outlines_psnr_db": psnr(done, truth, outline).mean().item(),
        "outlines_psnr_db_bicubic": psnr(enlarged, truth, outline).mean().item(),
        "outlines_psnr_db_reconstructed": psnr(best, truth, outline).mean().item(),
        "psnr_db": psnr(done, truth).mean().item(),
        "psnr_db_bicubic": psnr(enlarged, truth).mean().item(),
        "right": rates(done, specs)["all_right"],
        "right_bicubic": rates(enlarged, specs)["all_right"],
        "right_without_words": rates(untold, specs)["all_right"],
    }, torch.stack([truth, enlarged, untold, done], dim=1).flatten(0, 1)


def sharpness(images: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels within a mask, in decibels: (N,).

    images: (N, 3, H, W); mask: (N, 1, H, W).
    """
    down, across = images.diff(dim=2).square()[..., 1:], images.diff(dim=3).square()[..., 1:, :]
    slope = (down + across).mean(1, keepdim=True)  # (N, 1, H - 1, W - 1)
    inside = mask[..., 1:, 1:]
    mean = (slope * inside).sum((1, 2, 3)) / inside.sum((1, 2, 3)).clamp_min(1)
    return 10 * mean.clamp_min(1e-10).log10()


CONTROL_TASKS = inpaint, outpaint, controlnet_canny, super_resolution
