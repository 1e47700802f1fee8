"""The scenes and pictures that the demo's networks are trained on."""

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

from cascade_nodes.demo import recipe
from cascade_nodes.demo.dataset import Size, pictures, wide
from cascade_nodes.demo.job import Job
from cascade_nodes.demo.scenes import SceneTable
from cascade_nodes.demo.wide_scenes import FRAMES, sample_wide

SQUARE = FRAMES["1:1"]
OTHER_FRAMES = tuple(size for size in FRAMES.values() if size != SQUARE)


def ordinary_scenes(
    job: Job, count: int, *what: object, frame: Size = SQUARE, objects: Sequence[float] = ()
) -> SceneTable:
    """Scenes for captions, small and white objects not rare. objects: shares of one, two and three."""
    seed = job.seed("scenes", *what)
    return sample_wide(
        count, seed, objects=objects or recipe.OBJECTS, weights=recipe.SCENE_WEIGHTS, frame=frame
    )


def mixed_pictures(job: Job, count: int, *what: object, frame: Size = SQUARE) -> Tensor:
    """Ordinary and wide pictures, half of each: uint8 (count, 3, *frame)"""
    ordinary = pictures(ordinary_scenes(job, count - count // 2, *what, frame=frame), job.device, frame)
    return torch.cat([ordinary, wide(count // 2, job.seed("wide", *what), job.device, frame)])


def other_frame(job: Job, step: int, share: float) -> Size | None:
    """The frame (height, width) of a step's pictures; None for the square, as in most steps."""
    chance = Random(job.seed("frame", step))
    return chance.choice(OTHER_FRAMES) if chance.random() < share else None
