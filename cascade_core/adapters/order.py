"""The layer behind each number of an official LoRA file.

The published trainer numbers the layers whose names contain one of its `module_filters` (by default ".attn"), in the
network's own order. Its files hold neither, so both are found by the shapes.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations

from ..errors import CascadeError
from ..networks.config import PRESETS, StageCConfig
from .names import published_layers, stage_c_layer

# Parts of names that tell Stage C's kinds of layers apart, as the trainer's `module_filters` would.
FILTERS = (
    ".attn", "kv_mapper", "channelwise", "depthwise", ".mapper", "clip_", "embedding", "clf", "scalers",
    "repeat_mappers",
)  # fmt: skip
SIZES = {
    name.removeprefix("stage_c_").upper().replace("B", " B"): StageCConfig.from_dict(config)
    for name, (kind, config) in PRESETS.items()
    if kind == "stage_c"
}
Shapes = Sequence[tuple[int, int]]  # rows and columns of each numbered change


def kind(layer: str) -> str:
    """The part of a published layer's name, of `FILTERS`, that tells its kind."""
    return next(part for part in FILTERS if part in layer)


def layer_order(
    shapes: Shapes, metadata: Mapping[str, str], name: str, config: StageCConfig | None
) -> list[str]:
    """The published layer of each numbered change: as the metadata states, or the only way in which the shapes fit.

    config: the Stage C it is for; None: one of the published sizes. Raises CascadeError where it fits none, or several.
    """
    if "order" in metadata:
        return _stated_order(metadata["order"], len(shapes), name)
    if not shapes:
        return []
    configs = SIZES.values() if config is None else [config]
    orders = [order for each in configs for order in _orders(shapes, each)]
    if len(orders) == 1:
        return orders[0]
    file = f"{name} is an official LoRA of {len(shapes)} numbered layers (the first {shapes[0][0]} × {shapes[0][1]})"
    if orders:
        raise CascadeError(
            f"{file}, which could be of different kinds; state their names in its metadata (order, a JSON list), or "
            "convert it where it was made."
        )
    fitting = [name for name, size in SIZES.items() if config is not None and _orders(shapes, size)]
    if config is None:
        raise CascadeError(
            f"{file}, which are none of the published Stage Cs' ({', '.join(SIZES)}); give the Stage C that it was "
            "made for."
        )
    advice = f"it is for the {fitting[0]} one" if fitting else "choose the one that it was made for"
    widths = ", ".join(map(str, config.c_hidden))
    raise CascadeError(f"{file}, which are not this Stage C's ({widths} wide); {advice}.")


def _stated_order(text: str, count: int, name: str) -> list[str]:
    try:
        layers = [stage_c_layer(re.sub(r"[._]weight$", "", entry)) for entry in json.loads(text)]
    except (ValueError, TypeError, RecursionError):
        layers = []
    named = [layer for layer in layers if layer is not None]
    if len(named) != count or len(layers) != count:
        raise CascadeError(
            f"{name}: the order in its metadata is no JSON list of the {count} layers that it changes; download it "
            "again."
        )
    return named


def _orders(shapes: Shapes, config: StageCConfig) -> list[list[str]]:
    """Lists every choice of kinds of layers whose shapes, in order, equal `shapes`."""
    layers = published_layers(config)
    counts = Counter(map(kind, layers))
    orders = []
    for size in range(1, len(counts) + 1):
        for chosen in combinations((part for part in FILTERS if part in counts), size):
            if sum(counts[part] for part in chosen) != len(shapes):
                continue
            order = [layer for layer in layers if kind(layer) in chosen]
            if all(layers[layer][:2] == shape for layer, shape in zip(order, shapes, strict=True)):
                orders.append(order)
    return orders
