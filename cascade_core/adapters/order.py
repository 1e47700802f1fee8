"""The layer behind each number of an official LoRA file.

The published trainer numbers the layers whose modules' names contain one of its `module_filters` (by default ".attn"),
in the network's own order. Its files hold neither the filters nor the layers' names, so both are inferred from the
shapes, or given by the user.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations, product

from ..errors import CascadeError, quoted
from ..networks.config import PRESETS, StageCConfig
from .names import FUSED, published_layers, stage_c_layer

# Parts of names that distinguish Stage C's kinds of layers, usable as the trainer's `module_filters`.
FILTERS = (
    ".attn", "kv_mapper", "channelwise", "depthwise", ".mapper", "clip_", "embedding", "clf", "scalers",
    "repeat_mappers",
)  # fmt: skip
# Finer kinds, as far as a filter without a block's number can tell layers apart; the first found in a name counts.
_FINE_FILTERS = (
    "out_proj", ".attn", "kv_mapper", "channelwise.0", "channelwise.4", "depthwise", "mapper_sca", "mapper_crp",
    ".mapper", "clip_txt_mapper", "clip_txt_pooled", "clip_img", "embedding", "clf", "downscalers", "upscalers",
    "down_repeat", "up_repeat",
)  # fmt: skip
_IMPLIED = {".attn": {"out_proj"}, ".mapper": {"mapper_sca", "mapper_crp"}}  # kinds that a filter includes
_LONGEST_FILTERS = 10_000  # characters
_MOST_LEVELS = 8  # of blocks, down and up together, up to which combinations are tried
SIZES = {
    name.removeprefix("stage_c_").upper().replace("B", " B"): StageCConfig.from_dict(config)
    for name, (kind, config) in PRESETS.items()
    if kind == "stage_c"
}
Shapes = Sequence[tuple[int, ...]]  # rows and columns of each numbered change
Filters = Sequence[str]  # as the trainer's `module_filters`: parts of modules' names


def kind(layer: str) -> str:
    """The kind of a published layer: the part of its name that is in `FILTERS`."""
    return next(part for part in FILTERS if part in layer)


def filtered(layers: Iterable[str], filters: Filters) -> list[str]:
    """The published layers that the trainer changes with these `module_filters`.

    The fused attention input is a weight of the module `attn` itself.
    """
    return [layer for layer in layers if any(part in layer.removesuffix(f".{_INPUT}") for part in filters)]


_INPUT = FUSED.rpartition(".")[2]


def parse_filters(text: str) -> Filters | None:
    """Reads module_filters as in the trainer's YAML, `['.attn', 'clf']`, or with commas alone; None where empty.

    `null` finds every layer, as it does there.
    """
    if len(text) > _LONGEST_FILTERS:
        raise CascadeError(f"module_filters is {quoted(text)}; give parts of names such as .attn, clf.")
    if text.strip() in ("null", "None"):
        return ("",)
    parts = [part.strip().strip("'\"") for part in text.strip().strip("[]").split(",")]
    return tuple(part for part in parts if part) or None


def layer_order(
    shapes: Shapes,
    metadata: Mapping[str, str],
    name: str,
    config: StageCConfig | None,
    filters: Filters | None = None,
) -> list[str]:
    """The published layer of each numbered change: as stated, or from the only assignment that fits the shapes.

    config: the Stage C it is for; None: one of the published sizes. filters: the trainer's `module_filters`; None: as
    the metadata states, or not known. Raises CascadeError where the shapes fit none, or several.
    """
    if "order" in metadata and filters is None:
        return _stated_order(metadata["order"], len(shapes), name)
    if not shapes:
        return []
    filters = _stated_filters(metadata) if filters is None else filters
    file = f"{name} is an official LoRA of {len(shapes)} numbered layers (the first {shapes[0][0]} × {shapes[0][1]})"
    readings: dict[tuple[str, ...], Filters] = {}  # layers -> the first filters that find them
    for size in SIZES.values() if config is None else [config]:
        for said, order in _readings(shapes, size, filters):
            readings.setdefault(tuple(order), said)
    if len(readings) == 1:
        return list(*readings)
    if readings:
        choices = " or ".join(", ".join(said) for said in list(readings.values())[:3])
        raise CascadeError(
            f"{file}, which could be those of {choices}; give the module_filters that it was trained with (--filters "
            "in cascade convert-lora)."
        )
    if filters is not None:
        raise CascadeError(
            f"{file}, which are not those that the module_filters {quoted(list(filters))} find in "
            f"{'a published' if config is None else 'this'} Stage C; give those that it was trained with."
        )
    fitting = [name for name, size in SIZES.items() if config is not None and any(_readings(shapes, size))]
    if fitting:
        advice = f"it is for the {fitting[0]} one"
    else:
        advice = "choose the one that it was made for, or give the module_filters of its training"
    if config is None:
        raise CascadeError(
            f"{file}, which are none of the published Stage Cs' ({', '.join(SIZES)}); give the Stage C that it was "
            "made for, or the module_filters that it was trained with (--filters in cascade convert-lora)."
        )
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
            f"{name}: the order in its metadata is not a JSON list of the {count} layers that it changes; download it "
            "again."
        )
    return named


def _stated_filters(metadata: Mapping[str, str]) -> Filters | None:
    try:
        stated = json.loads(metadata.get("module_filters", "null"))
    except (ValueError, RecursionError):
        return None
    return stated if isinstance(stated, list) and all(isinstance(part, str) for part in stated) else None


def _readings(
    shapes: Shapes, config: StageCConfig, filters: Filters | None = None
) -> Iterator[tuple[Filters, list[str]]]:
    """Yields (filters, layers) for each way to filter whose layers' shapes, in order, equal `shapes`."""
    layers = {layer: shape[:2] for layer, shape in published_layers(config).items()}
    choices = _choices(shapes, layers) if filters is None else [(filters, set(filtered(layers, filters)))]
    for chosen, members in choices:
        order = [layer for layer in layers if layer in members]
        if [layers[layer] for layer in order] == list(shapes):
            yield chosen, order


def _choices(shapes: Shapes, layers: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[Filters, set[str]]]:
    """Yields (filters, layers) for combinations of whole levels and kinds of layers with the file's count of each
    shape.

    Filters with a block's number are not tried, since with them any set of layers would be possible.
    """
    file = Counter(shapes)
    fine = {layer: next(part for part in _FINE_FILTERS if part in layer) for layer in layers}
    blocks = [layer for layer in layers if layer.startswith(("down_blocks", "up_blocks"))]
    names = sorted({".".join(layer.split(".")[:2]) for layer in blocks})
    levels = [n for n in names if not _shapes(_of_level(blocks, n), layers) - file][:_MOST_LEVELS]
    for whole in _subsets(levels):
        inside = {layer for level in whole for layer in _of_level(blocks, level)}
        missing = file.copy()
        missing.subtract(_shapes(inside, layers))
        members: dict[str, list[str]] = {}
        for layer in layers:
            if layer not in inside:
                members.setdefault(fine[layer], []).append(layer)
        counts = {part: _shapes(found, layers) for part, found in members.items()}
        alike: dict[tuple[int, ...], list[str]] = {}  # kinds of layers by their most frequent shape
        for part, count in counts.items():
            if not count - file:
                alike.setdefault(count.most_common(1)[0][0], []).append(part)
        options = [
            [
                parts
                for parts in _subsets(found)
                if sum(counts[part][shape] for part in parts) == missing[shape]
            ]
            for shape, found in alike.items()
        ]
        for chosen in product(*options):
            parts = {part for group in chosen for part in group}
            needed = set().union(*(_IMPLIED.get(part, set()) for part in parts))
            if needed & members.keys() <= parts:
                said = [part for part in _FINE_FILTERS if part in parts - needed]
                yield [*whole, *said], inside.union(*(members[part] for part in parts))


def _of_level(blocks: Iterable[str], level: str) -> list[str]:
    return [layer for layer in blocks if layer.startswith(f"{level}.")]


def _shapes(found: Iterable[str], layers: Mapping[str, tuple[int, ...]]) -> Counter[tuple[int, ...]]:
    return Counter(layers[layer] for layer in found)


def _subsets(values: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return (chosen for size in range(len(values) + 1) for chosen in combinations(values, size))
