"""Scenes of the toy world, one to three coloured shapes on a background, and the rule of held-out scenes.

A scene's coordinates are fractions of the frame: x to the right, y down, the origin at the top left. Radii are
fractions of the frame's shorter side. `sample_scenes` draws the first world, of one or two objects in a square, which
measurements refer to; `wide_scenes.py` draws the larger one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.demo.shapes import SHAPES as SHAPE_DISTANCES

SHAPES = tuple(SHAPE_DISTANCES)
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")
BACKGROUNDS = ("sky", "sand", "grass", "pink", "grey")
SIZES = ("small", "large")
RELATIONS = ("left", "right", "above", "below")
INVERSE = {"left": "right", "right": "left", "above": "below", "below": "above"}

RADIUS = {"small": (0.10, 0.12), "large": (0.17, 0.20)}
MARGIN = 0.035  # between an object and the frame
GAP = 0.06  # the least space between two objects, along the axis of their relation
SPREAD = 0.62  # the greatest distance between the centres of two objects
JITTER = 0.05  # of each object, across the axis of their relation

HELD_OUT_TRIPLES = 10  # one (object, relation, object) triple in ten


@dataclass(frozen=True, slots=True)
class SceneObject:
    """Object of a scene; its shape lies within `radius` of the centre (x, y) along both axes."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True)
class Scene:
    """Scene of one to three objects; `relation`: position of the first relative to the second, such as "left"."""

    objects: tuple[SceneObject, ...]
    background: str
    relation: str | None = None
    aspect: float = 1.0  # the frame's width by its height


class SceneTable(NamedTuple):
    """Many scenes as arrays; a slot without an object has kind -1."""

    kind: np.ndarray  # (N, slots) int64: shape * 8 + colour
    size: np.ndarray  # (N, slots) int64, index into SIZES
    centre: np.ndarray  # (N, slots, 2) float64, (x, y)
    radius: np.ndarray  # (N, slots) float64
    relation: np.ndarray  # (N,) int64, index into RELATIONS; -1: none
    background: np.ndarray  # (N,) int64, index into BACKGROUNDS
    aspect: np.ndarray  # (N,) float64

    def rows(self, rows: slice | np.ndarray) -> "SceneTable":
        """Some of the scenes."""
        return SceneTable._make(column[rows] for column in self)

    def scenes(self) -> list[Scene]:
        """The scenes one by one."""
        columns = (column.tolist() for column in self)
        return [
            Scene(
                tuple(
                    SceneObject(SHAPES[kind // 8], COLOURS[kind % 8], SIZES[size], x, y, radius)
                    for kind, size, (x, y), radius in zip(kinds, sizes, centres, radii, strict=True)
                    if kind >= 0
                ),
                BACKGROUNDS[ground],
                None if relation < 0 else RELATIONS[relation],
                aspect,
            )
            for kinds, sizes, centres, radii, relation, ground, aspect in zip(*columns, strict=True)
        ]


# Held-out combinations. An object's kind is shape * 8 + colour.


def is_held_out_pair(kind: np.ndarray) -> np.ndarray:
    """Whether a (shape, colour) is never trained on: each shape once and each colour once (a Latin pick)."""
    shape, colour = kind // 8, kind % 8
    return (3 * shape + 2) % 8 == colour


def is_held_out_triple(first: np.ndarray, relation: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Whether (object kind, relation, object kind) is never trained on; "A left of B" equals "B right of A"."""
    inverted = relation % 2 == 1  # "right" and "below": read them from the other side
    a, b = np.where(inverted, second, first), np.where(inverted, first, second)
    key = ((a * 64 + b) * 2 + relation // 2).astype(np.uint64)
    # A fixed 64-bit mixing function (splitmix64), so that the choice never depends on a seed or a platform.
    key = (key + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (key ^ (key >> np.uint64(31))) % np.uint64(HELD_OUT_TRIPLES) == 0


def held_out_reason(scene: Scene) -> str | None:
    """ "pair" or "triple" if the scene is kept from training, else None; any two objects make a triple."""
    kinds = np.array([SHAPES.index(o.shape) * 8 + COLOURS.index(o.colour) for o in scene.objects])
    if is_held_out_pair(kinds).any():
        return "pair"
    centres = np.array([(o.x, o.y) for o in scene.objects])
    first, second = np.triu_indices(len(kinds), 1)
    relation = relation_of(centres[first], centres[second], np.array(scene.aspect))
    return "triple" if is_held_out_triple(kinds[first], relation, kinds[second]).any() else None


def relation_of(first: np.ndarray, second: np.ndarray, aspect: np.ndarray) -> np.ndarray:
    """Relations of centres (…, 2) to others, along the axis on which they are further apart: indices into RELATIONS."""
    dx, dy = (second[..., 0] - first[..., 0]) * aspect, second[..., 1] - first[..., 1]
    return np.where(np.abs(dx) >= np.abs(dy), np.where(dx >= 0, 0, 1), np.where(dy >= 0, 2, 3))


# Sampling


def sample_scenes(n: int, seed: int, split: str = "train") -> list[Scene]:
    """n random scenes: "train" has nothing held out; "held_out" has, by turns, a held-out pair and a held-out
    triple of trained pairs. A third of the training scenes and of the held-out pairs are single objects.
    """
    return sample_table(n, seed, split).scenes()


def sample_table(n: int, seed: int, split: str = "train") -> SceneTable:
    """The scenes of `sample_scenes` as arrays, which are drawn a hundred times as fast."""
    if split not in ("train", "held_out"):
        raise CascadeError(f"sample_scenes: split is {split!r}, but it must be 'train' or 'held_out'.")
    rng = np.random.default_rng([seed, split == "held_out"])
    if split == "train":
        kinds, relation = _sample_kinds(n, rng, "train")
    else:
        pairs, triples = _sample_kinds(n - n // 2, rng, "pair"), _sample_kinds(n // 2, rng, "triple")
        kinds, relation = np.empty((n, 2), np.int64), np.empty(n, np.int64)
        kinds[0::2], kinds[1::2] = pairs[0], triples[0]
        relation[0::2], relation[1::2] = pairs[1], triples[1]
    return _build(kinds, relation, rng)


def _sample_kinds(n: int, rng: np.random.Generator, want: str) -> tuple[np.ndarray, np.ndarray]:
    """Object kinds (n, 2) and relations (n,), -1 for a single, all of them "train", "pair" or "triple"."""
    single = np.zeros(n, bool) if want == "triple" else rng.random(n) < 1 / 3
    kinds, relation = np.empty((n, 2), np.int64), np.full(n, -1)
    kinds[single], _ = _accepted(int(single.sum()), rng, want, single=True)
    kinds[~single], relation[~single] = _accepted(n - int(single.sum()), rng, want, single=False)
    return kinds, relation


def _accepted(n: int, rng: np.random.Generator, want: str, single: bool) -> tuple[np.ndarray, np.ndarray]:
    """Kinds (n, 2) and relations (n,) by rejection sampling; for a single object, only the first kind counts."""
    kinds, relations = np.empty((0, 2), np.int64), np.empty(0, np.int64)
    while len(kinds) < n:
        draw, relation = rng.integers(0, 64, (2 * n + 64, 2)), rng.integers(0, 4, 2 * n + 64)
        if want == "pair":  # put a held-out pair in one of the slots
            shape, slot = rng.integers(0, 8, len(draw)), 0 if single else rng.integers(0, 2, len(draw))
            draw[np.arange(len(draw)), slot] = shape * 8 + (3 * shape + 2) % 8
        first, second = draw.T
        pair, triple = is_held_out_pair(first), np.zeros(len(draw), bool)
        if not single:
            pair |= is_held_out_pair(second)
            triple = is_held_out_triple(first, relation, second)
        fits = {"train": ~pair & ~triple, "pair": pair, "triple": ~pair & triple}[want]
        if not single:
            fits &= first != second  # two equal objects could not be told apart
        kinds, relations = np.concatenate([kinds, draw[fits]]), np.concatenate([relations, relation[fits]])
    return kinds[:n], relations[:n]


def _build(kinds: np.ndarray, relation: np.ndarray, rng: np.random.Generator) -> SceneTable:
    """Draws sizes, places and backgrounds for the kinds."""
    n = len(kinds)
    size = rng.integers(0, 2, (n, 2))
    radius, centre = _place(size, relation, rng)
    background = rng.integers(0, len(BACKGROUNDS), n)
    return _assemble(kinds, relation, size, radius, centre, background)


def _place(size: np.ndarray, relation: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Radii (n, 2) of the sizes, and centres (n, 2 objects, 2) that satisfy `relation`; -1: a single object."""
    n = len(relation)
    low, high = np.array([RADIUS[name] for name in SIZES]).T
    radius = low[size] + (high - low)[size] * rng.random((n, 2))
    centre = place_pairs(radius, relation, rng)
    single = relation < 0
    edge = MARGIN + radius[:, :1]
    centre[single, 0] = (edge + (1 - 2 * edge) * rng.random((n, 2)))[single]
    return radius, centre


def _assemble(
    kinds: np.ndarray,
    relation: np.ndarray,
    size: np.ndarray,
    radius: np.ndarray,
    centre: np.ndarray,
    background: np.ndarray,
) -> SceneTable:
    kinds = kinds.copy()
    kinds[relation < 0, 1] = -1
    return SceneTable(kinds, size, centre, radius, relation, background, np.ones(len(kinds)))


def alone(scenes: Sequence[Scene], slot: int, seed: int) -> list[Scene]:
    """Places one object of each scene (slot 0, or 1 where there are two) alone, anywhere on the same background."""
    rng = np.random.default_rng([seed, 3 + slot])
    kinds, _, size, background = _arrays(scenes)
    kinds, size = np.roll(kinds, -slot, 1), np.roll(size, -slot, 1)
    single = np.full(len(scenes), -1)
    return _assemble(kinds, single, size, *_place(size, single, rng), background).scenes()


def _arrays(scenes: Sequence[Scene]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Kinds (n, 2), relations (n,), sizes (n, 2) and backgrounds (n,) as the sampler draws them."""
    kinds, size = np.zeros((len(scenes), 2), np.int64), np.zeros((len(scenes), 2), np.int64)
    relation, background = np.full(len(scenes), -1), np.zeros(len(scenes), np.int64)
    for i, scene in enumerate(scenes):
        for slot, o in enumerate(scene.objects):
            kinds[i, slot] = SHAPES.index(o.shape) * 8 + COLOURS.index(o.colour)
            size[i, slot] = SIZES.index(o.size)
        if scene.relation is not None:
            relation[i] = RELATIONS.index(scene.relation)
        background[i] = BACKGROUNDS.index(scene.background)
    return kinds, relation, size, background


def place_pairs(
    radius: np.ndarray,
    relation: np.ndarray,
    rng: np.random.Generator,
    extent: tuple[float, float] = (1.0, 1.0),
) -> np.ndarray:
    """Centres (n, 2 objects, 2) of objects with these radii that satisfy `relation`, well apart.

    extent: the frame's width and height. All in units of its shorter side.
    """
    n = len(relation)
    horizontal = relation < 2
    length, breadth = np.where(horizontal, *extent), np.where(horizontal, *extent[::-1])
    room = length - 2 * MARGIN - radius.sum(1)
    nearest = radius.sum(1) + GAP
    distance = nearest + (np.minimum(room, SPREAD * length) - nearest) * rng.random(n)
    swapped = relation % 2 == 1  # "right" and "below": the second object comes first along the axis
    leading = np.where(swapped, radius[:, 1], radius[:, 0])
    start = MARGIN + leading + (room - distance) * rng.random(n)
    along = np.stack([start, start + distance], 1)
    along = np.where(swapped[:, None], along[:, ::-1], along)
    edge = MARGIN + JITTER + radius.max(1)
    across = (edge + (breadth - 2 * edge) * rng.random(n))[:, None] + JITTER * (2 * rng.random((n, 2)) - 1)
    return np.stack(
        [np.where(horizontal[:, None], along, across), np.where(horizontal[:, None], across, along)], 2
    )
