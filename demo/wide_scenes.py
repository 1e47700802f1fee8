"""The larger toy world: up to three objects, frames of other proportions, and chosen shares of sizes and colours."""

from collections.abc import Mapping, Sequence

import numpy as np

from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    GAP,
    MARGIN,
    RADIUS,
    SHAPES,
    SIZES,
    SceneTable,
    is_held_out_pair,
    is_held_out_triple,
    place_pairs,
    relation_of,
)

MOST_OBJECTS = 3
TRIES = 4096  # candidates drawn at once for scenes without a fitting one
# (height, width), multiples of 8 with about the area of 256 × 256
FRAMES = {
    "1:1": (256, 256),
    "3:2": (208, 312),
    "2:3": (312, 208),
    "16:9": (192, 344),
    "9:16": (344, 192),
}


def sample_wide(
    n: int,
    seed: int,
    split: str = "train",
    objects: Sequence[float] = (0.3, 0.4, 0.3),
    weights: Mapping[str, float] | None = None,
    frame: tuple[int, int] = FRAMES["1:1"],
) -> SceneTable:
    """n random scenes of one to three objects that do not overlap.

    split: "train" has no held-out pair, nor a held-out triple of any two of its objects; "held_out" has, alternately,
    a held-out pair, and a held-out triple as the first relation; for a single object always a pair.
    objects: shares of scenes with one, two and three.
    weights: of sizes, colours and shapes relative to others of their kind, `{"small": 2.0, "white": 2.0}`.
    frame: (height, width); only its proportions matter.
    """
    if split not in ("train", "held_out"):
        raise CascadeError(f"sample_wide: split is {split!r}, but it must be 'train' or 'held_out'.")
    weights = weights or {}
    rng = np.random.default_rng([seed, split == "held_out", MOST_OBJECTS])
    shares = np.array([*objects, 0, 0][:MOST_OBJECTS], np.float64)
    count = rng.choice(MOST_OBJECTS, n, p=shares / shares.sum()) + 1
    # 0: nothing held out, 1: a pair, 2: a triple
    want = (
        np.zeros(n, np.int64) if split == "train" else np.where((np.arange(n) % 2 == 0) | (count == 1), 1, 2)
    )
    drawn = SceneTable(
        np.full((n, MOST_OBJECTS), -1),
        _draw(rng, SIZES, weights, (n, MOST_OBJECTS)),
        np.zeros((n, MOST_OBJECTS, 2)),
        np.zeros((n, MOST_OBJECTS)),
        np.full(n, -1),
        rng.integers(0, len(BACKGROUNDS), n),
        np.full(n, frame[1] / frame[0]),
    )
    missing = np.arange(n)
    while len(missing):
        tries = np.repeat(missing, max(TRIES // len(missing), 1))
        kind = _draw_kinds(rng, want[tries], count[tries], weights)
        relation = np.where(count[tries] > 1, rng.integers(0, 4, len(tries)), -1)
        centre, radius = place(rng, drawn.size[tries], relation, count[tries], frame)
        right = _fits(kind, relation, centre, radius, count[tries], want[tries], frame).nonzero()[0]
        rows, first = np.unique(tries[right], return_index=True)
        chosen = right[first]
        drawn.kind[rows], drawn.relation[rows] = kind[chosen], relation[chosen]
        drawn.centre[rows], drawn.radius[rows] = centre[chosen], radius[chosen]
        missing = np.setdiff1d(missing, rows, assume_unique=True)
    return drawn


def _draw(
    rng: np.random.Generator, names: Sequence[str], weights: Mapping[str, float], shape: tuple[int, ...]
) -> np.ndarray:
    """Indices into names, by their weights."""
    weight = np.array([weights.get(name, 1.0) for name in names], np.float64)
    return rng.choice(len(names), shape, p=weight / weight.sum())


def _draw_kinds(
    rng: np.random.Generator, want: np.ndarray, count: np.ndarray, weights: Mapping[str, float]
) -> np.ndarray:
    """Kinds (n, 3), including a held-out pair where one is wanted; -1 beyond the count."""
    shape = _draw(rng, SHAPES, weights, (len(want), MOST_OBJECTS))
    colour = _draw(rng, COLOURS, weights, shape.shape)
    slot = (rng.random(len(want)) * count).astype(np.int64)
    here = (want == 1)[:, None] & (np.arange(MOST_OBJECTS) == slot[:, None])
    colour = np.where(here, (3 * shape + 2) % 8, colour)
    return np.where(np.arange(MOST_OBJECTS) < count[:, None], shape * 8 + colour, -1)


def place(
    rng: np.random.Generator,
    size: np.ndarray,
    relation: np.ndarray,
    count: np.ndarray,
    frame: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Centres (n, 3, 2) and radii (n, 3): the first two by their relation, a single or third object anywhere."""
    n = len(size)
    extent = np.array([frame[1], frame[0]]) / min(frame)
    low, high = np.array([RADIUS[name] for name in SIZES]).T
    radius = low[size] + (high - low)[size] * rng.random(size.shape)
    edge = MARGIN + radius[..., None]
    centre = edge + (extent - 2 * edge) * rng.random((n, MOST_OBJECTS, 2))
    pairs = place_pairs(radius[:, :2], relation, rng, (extent[0], extent[1]))
    centre[:, :2] = np.where((count > 1)[:, None, None], pairs, centre[:, :2])
    return centre / extent, radius


def _fits(
    kind: np.ndarray,
    relation: np.ndarray,
    centre: np.ndarray,
    radius: np.ndarray,
    count: np.ndarray,
    want: np.ndarray,
    frame: tuple[int, int],
) -> np.ndarray:
    """Whether a scene has the wanted combination, no two equal objects, and room between any two objects."""
    extent = np.array([frame[1], frame[0]]) / min(frame)
    aspect = np.array(frame[1] / frame[0])
    pair = (is_held_out_pair(kind) & (kind >= 0)).any(1)
    right = np.where(want == 1, pair, ~pair)
    triple = np.zeros(len(kind), bool)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        both = count > b
        apart = np.abs(centre[:, a] - centre[:, b]) * extent
        right &= ~both | (kind[:, a] != kind[:, b])
        right &= ~both | (apart.max(1) >= radius[:, a] + radius[:, b] + GAP)
        stands = relation_of(centre[:, a], centre[:, b], aspect)
        triple |= both & is_held_out_triple(kind[:, a], stands, kind[:, b])
    first = (count > 1) & is_held_out_triple(kind[:, 0], relation, kind[:, 1])
    return right & np.where(want == 2, first, (want == 1) | ~triple)
