"""Measures the larger world, and objects by pair of shape and colour, on separate sets."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

import numpy as np
import torch
from torch import Tensor

from cascade_nodes.demo.captions import ObjectSpec, Spec, punctuated, verbalise
from cascade_nodes.demo.judge import read, score, summary
from cascade_nodes.demo.measuring import SEED, in_batches, prompts_of
from cascade_nodes.demo.pipeline import DemoCascade, Sampling
from cascade_nodes.demo.read_embeddings import embeddings
from cascade_nodes.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SceneTable,
    is_held_out_pair,
    sample_scenes,
)
from cascade_nodes.demo.second_reading import agreement
from cascade_nodes.demo.shares import Groups, Share, by_kind, share
from cascade_nodes.demo.wide_scenes import FRAMES, place, sample_wide
from cascade_nodes.demo.world import render

EACH = 60  # objects of each pair of shape and colour
ONE_PASS = ("3:2", "16:9", "9:16")  # proportions

Figures = dict[str, float | Share | Groups]


def sample_pairs(each: int, seed: int) -> SceneTable:
    """Scenes in which each of the 64 pairs of shape and colour is the first object `each` times, alternately small
    and large.

    A third of them are alone, the others beside an object of another shape and colour that is not a held-out pair.
    """
    rng = np.random.default_rng([seed, 64])
    kind, n = np.repeat(np.arange(64), each), 64 * each
    others = np.flatnonzero(~is_held_out_pair(np.arange(64)))
    different = (others // 8 != kind[:, None] // 8) & (others % 8 != kind[:, None] % 8)
    companion = others[(rng.random(different.shape) * different).argmax(1)]
    count = np.where(np.arange(n) % 3 == 0, 1, 2)
    size = np.stack([np.arange(n) % 2, *rng.integers(0, 2, (2, n))], 1)
    relation = np.where(count > 1, rng.integers(0, 4, n), -1)
    centre, radius = place(rng, size, relation, count, FRAMES["1:1"])
    kinds = np.stack([kind, np.where(count > 1, companion, -1), np.full(n, -1)], 1)
    return SceneTable(kinds, size, centre, radius, relation, rng.integers(0, len(BACKGROUNDS), n), np.ones(n))


def _pair_figures(images: Tensor, scenes: SceneTable, specs: Sequence[Spec]) -> Figures:
    scores = [score(reading, spec) for reading, spec in zip(read(images), specs, strict=True)]
    objects = [s.objects[0] for s in scores]
    right = np.array([False not in o.verdicts for o in objects])
    held_out, small = is_held_out_pair(scenes.kind[:, 0]), scenes.size[:, 0] == 0
    return {
        "shapes": share(o.shape is True for o in objects),
        "colours": share(o.colour is True for o in objects),
        "sizes": share(o.size is True for o in objects),
        "right": share(right),
        "right_small": share(right[small]),
        "right_large": share(right[~small]),
        "right_held_out": share(right[held_out]),
        "right_small_held_out": share(right[held_out & small]),
        "by": by_kind(scores, specs, only=0),
    }


def pairs(cascade: DemoCascade, count: int, prior: Sampling, decoder: Sampling) -> tuple[Figures, Tensor]:
    """Measures each of the 64 pairs of shape and colour in pictures of prompts."""
    scenes = sample_pairs(max(EACH * count // 500, 2), SEED + 40)
    prompts, specs = prompts_of(scenes.scenes())
    images = cascade.pictures(prompts, SEED, prior, decoder)
    return _pair_figures(images, scenes, specs), images


def renderer(cascade: DemoCascade, count: int, prior: Sampling, decoder: Sampling) -> tuple[Figures, Tensor]:
    """Measures Stage B on the renderer's own latents: shares of objects read back right."""
    scenes = sample_pairs(max(EACH * count // 500, 2), SEED + 41)
    prompts, specs = prompts_of(scenes.scenes())
    sources = render(scenes, device=cascade.device)

    def decode(rows: slice) -> Tensor:
        return cascade.decode(cascade.compress(sources[rows]), prompts[rows], SEED + rows.start, decoder)

    images = in_batches(decode, len(prompts), cascade.batch)
    return _pair_figures(images, scenes, specs), images


def _prompted(
    cascade: DemoCascade, prompts: Sequence[str], specs: Sequence[Spec], prior: Sampling, decoder: Sampling,
    size: tuple[int, int] = FRAMES["1:1"],
) -> tuple[Figures, Tensor]:  # fmt: skip
    images = cascade.pictures(prompts, SEED, prior, decoder, size=size)
    scores = [score(reading, spec) for reading, spec in zip(read(images), specs, strict=True)]
    rates = summary(scores)
    return {**rates, "all_right": share(s.all_right for s in scores), "by": by_kind(scores, specs)}, images


def three(cascade: DemoCascade, count: int, prior: Sampling, decoder: Sampling) -> tuple[Figures, Tensor]:
    """Measures held-out prompts of three objects."""
    scenes = sample_wide(count, SEED + 42, "held_out", objects=(0, 0, 1)).scenes()
    return _prompted(cascade, *prompts_of(scenes), prior, decoder)


def negation(cascade: DemoCascade, count: int, prior: Sampling, decoder: Sampling) -> tuple[Figures, Tensor]:
    """Measures prompts that negate an attribute left open otherwise, and the same prompts without the negation."""
    rng = Random(SEED + 43)
    specs = []
    for number in range(count):
        shape, colour = rng.choice(SHAPES), rng.choice(COLOURS)
        stated, absent = ObjectSpec(shape=shape), ObjectSpec(colour=colour)
        if number % 2:
            stated, absent = ObjectSpec(colour=colour), ObjectSpec(shape=shape)
        specs.append(Spec((stated,), None, rng.choice(BACKGROUNDS), True, (absent,)))
    figures, images = _prompted(cascade, [verbalise(spec, rng) for spec in specs], specs, prior, decoder)
    silent = cascade.pictures(
        [verbalise(replace(spec, absent=()), rng) for spec in specs], SEED, prior, decoder
    )
    unsaid = summary(score(r, s) for r, s in zip(read(silent), specs, strict=True))
    return {**figures, "absences_unsaid": unsaid["absences"]}, images


def punctuation(
    cascade: DemoCascade, count: int, prior: Sampling, decoder: Sampling
) -> tuple[Figures, Tensor]:
    """Measures held-out prompts with meaningless punctuation."""
    prompts, specs = prompts_of(sample_scenes(count, SEED, "held_out"))
    rng = Random(SEED + 44)
    return _prompted(cascade, [punctuated(p, rng, 1.0) for p in prompts], specs, prior, decoder)


def proportions(
    cascade: DemoCascade, count: int, prior: Sampling, decoder: Sampling
) -> tuple[Figures, Tensor]:
    """Measures held-out prompts in frames of other proportions, in one pass; shows those of 3:2."""
    figures: Figures = {}
    right: list[bool] = []
    shown = torch.empty(0)
    for number, name in enumerate(ONE_PASS):
        scenes = sample_wide(
            count // len(ONE_PASS), SEED + 45 + number, "held_out", objects=(1, 2, 0), frame=FRAMES[name]
        ).scenes()
        prompts, specs = prompts_of(scenes)
        images = cascade.pictures(prompts, SEED, prior, decoder, size=FRAMES[name])
        scores = [score(reading, spec) for reading, spec in zip(read(images), specs, strict=True)]
        right += [s.all_right for s in scores]
        figures[name] = share(s.all_right for s in scores)
        shown = shown if len(shown) else images
    return {"all_right": share(right), **figures}, shown


def judges(cascade: DemoCascade, count: int, prior: Sampling, decoder: Sampling) -> tuple[Figures, Tensor]:
    """Compares the two judges on held-out prompts' pictures and on rendered scenes."""
    scenes = sample_scenes(count, SEED, "held_out")
    prompts, specs = prompts_of(scenes)
    images = cascade.pictures(prompts, SEED, prior, decoder)
    return {
        **{f"{name}_on_pictures": value for name, value in agreement(images, specs).items()},
        **{f"{name}_on_renders": value for name, value in agreement(render(scenes), specs).items()},
    }, images


Measure = Callable[[DemoCascade, int, Sampling, Sampling], tuple[Figures, Tensor]]
WIDE_TASKS: dict[str, Measure] = {
    task.__name__: task
    for task in (pairs, renderer, three, negation, punctuation, proportions, judges, embeddings)
}
