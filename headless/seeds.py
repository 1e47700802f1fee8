"""Random seeds: `random` in a seed's place draws one for the run."""

from __future__ import annotations

import secrets

from .graph import Graph

SEED_INPUTS = ("seed", "noise_seed")
RANDOM = "random"
_MOST = 2**50  # as on the canvas, since JavaScript's numbers hold these exactly


def draw_seeds(graph: Graph) -> tuple[Graph, int | None]:
    """The graph with one drawn number as every seed that is `random`, and that number; None where no seed is."""
    drawn = {
        node_id: [name for name in SEED_INPUTS if node["inputs"].get(name) == RANDOM]
        for node_id, node in graph.items()
    }
    if not any(drawn.values()):
        return graph, None
    seed = secrets.randbelow(_MOST)
    return {
        node_id: {**node, "inputs": {**node["inputs"], **dict.fromkeys(drawn[node_id], seed)}}
        for node_id, node in graph.items()
    }, seed
