"""The published trainer's files: layers are numbered in the network's own order, and the attention input is one layer.

`weights.N.lora_down` (rank, c_in), `weights.N.lora_up` (c_out, rank), ΔW = up @ down / rank; `embeddings.indices`
(n,) are the rows of the vocabulary that `embeddings.embeddings` (n, C) is added to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.files import FLOATING
from ..errors import CascadeError
from ..networks.config import StageCConfig
from ..text.learned_tokens import LearnedToken
from .adapter import Adapter
from .changes import Change, LowRank, belong_together, low_rank_changes
from .fused import exact_product, fuse, split
from .names import FUSED, QKV, is_convolution, published_layers, published_parameter
from .order import FILTERS, Filters, kind, layer_order

_NUMBERED = re.compile(r"weights\.(\d{1,6})\.lora_(down|up)")
HEADER = ("order", "module_filters", "rank", "train_tokens")  # stated by our own files
_TOKENS = ("embeddings.embeddings", "embeddings.indices")

Pair = tuple[Tensor, Tensor]  # down, up


def is_official(names: Iterable[str]) -> bool:
    """Whether a file's names are the published trainer's."""
    return any(_NUMBERED.fullmatch(name) or name in _TOKENS for name in names)


def read_official(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    name: str,
    config: StageCConfig | None,
    filters: Filters | None = None,
) -> Adapter:
    """config: the Stage C it was made for; None: the published one that its shapes fit; filters: as in `layer_order`.

    Raises CascadeError where the file is damaged or fits no Stage C in a single way.
    """
    pairs = _pairs(tensors, name)
    stage_c: dict[str, Change] = {}
    kernel = (config or StageCConfig()).kernel_size
    shapes = [(len(up), down.shape[1]) for down, up in pairs]
    order = layer_order(shapes, metadata, name, config, filters)
    for layer, (down, up) in zip(order, pairs, strict=True):
        change = _layer_change(layer, down, up, kernel)
        if layer.endswith(FUSED):
            stage_c |= split(change, layer)
        else:
            stage_c[layer] = change
    read = {*_TOKENS, *(f"weights.{i}.lora_{part}" for i in range(len(pairs)) for part in ("down", "up"))}
    unknown = tuple(key for key in tensors if key not in read)
    return Adapter(name, "official", stage_c, {}, _tokens(tensors, metadata, name), unknown)


def _pairs(tensors: Mapping[str, Tensor], name: str) -> list[Pair]:
    numbers = {int(match[1]) for key in tensors if (match := _NUMBERED.fullmatch(key))}
    pairs = []
    for i in range(max(numbers, default=-1) + 1):
        down, up = (tensors.get(f"weights.{i}.lora_{part}") for part in ("down", "up"))
        if down is None or up is None or down.ndim != 2 or not belong_together(down, up):
            raise CascadeError(
                f"{name} is an official LoRA whose weights.{i} has no lora_down (rank, c_in) and lora_up (c_out, rank) "
                "that belong together; download it again."
            )
        pairs.append((down, up))
    return pairs


def _layer_change(layer: str, down: Tensor, up: Tensor, kernel: int) -> LowRank:
    """Converts a pair to a change of the layer. The trainer adds one value to all positions of a depthwise kernel."""
    if is_convolution(layer):
        size = kernel if layer.endswith("depthwise") else 1
        down = down[:, :, None, None].expand(-1, -1, size, size)
        up = up[:, :, None, None]
    return LowRank(down, up, alpha=1.0)


def _tokens(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], name: str
) -> tuple[LearnedToken, ...]:
    """A learned token for each row. Only our files name new tokens, in `train_tokens`, and hold all of their rows."""
    if not tensors.keys() & set(_TOKENS):
        return ()
    embeddings, indices = (tensors.get(key, torch.empty(())) for key in _TOKENS)
    floating = embeddings.ndim == 2 and embeddings.dtype in FLOATING
    numbers = indices.dtype in (torch.int32, torch.int64) and bool((indices >= 0).all())
    if not (floating and numbers) or indices.shape != embeddings.shape[:1]:
        raise CascadeError(
            f"{name} is an official LoRA whose embeddings.embeddings (n, C) and embeddings.indices (n,), whole numbers "
            "from 0 on, do not belong together; download it again."
        )
    names = _stated_names(metadata, indices)
    return tuple(
        LearnedToken(names[index], row) if index in names else LearnedToken("", row, index)
        for index, row in zip(map(int, indices.tolist()), embeddings.float()[:, None], strict=True)
    )


def _stated_names(metadata: Mapping[str, str], indices: Tensor) -> dict[int, str]:
    """{row: name} of new tokens that began as zeros, whose rows are therefore whole. They are numbered last."""
    new = [entry for entry in _train_tokens(metadata.get("train_tokens", "[]")) if is_new(entry[0])]
    rows = sorted(set(map(int, indices.tolist())))[len(indices) - len(new) :]
    if len(rows) != len(new):
        return {}
    return {row: name for row, (name, pattern) in zip(rows, new, strict=True) if pattern is None}


def _train_tokens(text: str) -> list[tuple[str, Any]]:
    """Reads the published setting from JSON: pairs in the order of the rows. The first of a pair is a new token's
    name, or a pattern of tokens in the vocabulary; the second is a pattern of the tokens whose mean a new token began
    as, or None for zeros.
    """
    try:
        return [(str(name), pattern) for name, pattern in json.loads(text)]
    except (ValueError, TypeError, RecursionError):
        return []


def joined_tokens(old: str, new: str) -> str:
    """The setting `train_tokens` with new tokens after the old ones; of two with one name, the new one is kept."""
    added = _train_tokens(new)
    names = {name for name, _ in added}
    return json.dumps([entry for entry in _train_tokens(old) if entry[0] not in names] + added)


def is_new(name: str) -> bool:
    """Whether an entry of `train_tokens` is a new token to the published trainer: its name is in brackets."""
    return name[:1] + name[-1:] in ("[]", "<>")


def write_official(
    adapter: Adapter, config: StageCConfig, vocabulary: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata). Layers of the same kinds that the adapter does not change get zeros, and all layers get
    the same rank.

    vocabulary: number of tokens in the text encoder, from which new ones are numbered.
    """
    layers = published_layers(config)
    changes = _fused_changes(low_rank_changes(adapter.stage_c), layers)
    kinds = sorted(set(map(kind, changes)), key=FILTERS.index)
    order = [layer for layer in layers if kind(layer) in kinds]
    rank = max((change.rank for change in changes.values()), default=0)
    dtype = next((change.down.dtype for change in changes.values()), torch.float32)
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(order):
        rows, columns = layers[layer][:2]
        change = changes.get(layer) or LowRank(
            torch.zeros(0, columns, dtype=dtype), torch.zeros(rows, 0, dtype=dtype)
        )
        tensors |= {
            f"weights.{i}.lora_{part}": tensor for part, tensor in _numbered(change, layer, rank).items()
        }
    tensors |= _token_tensors(adapter.tokens, config.c_clip_text, vocabulary)
    stated: dict[str, Any] = {
        "order": [published_parameter(layer) for layer in order],
        "module_filters": kinds,
        "rank": rank,
        "train_tokens": [(token.name, None) for token in adapter.tokens if token.index is None],
    }
    return tensors, {key: json.dumps(value) for key, value in stated.items()}


def _token_tensors(tokens: Sequence[LearnedToken], width: int, vocabulary: int) -> dict[str, Tensor]:
    """The tensors of the tokens; new ones are numbered after the vocabulary."""
    rows = torch.cat([token.vectors for token in tokens] or [torch.zeros(0, width)])
    indices = [token.index for token in tokens]
    new = count(max([vocabulary, *(index + 1 for index in indices if index is not None)]))
    numbered = [next(new) if index is None else index for index in indices]
    return dict(zip(_TOKENS, (rows, torch.tensor(numbered, dtype=torch.int64)), strict=True))


def _fused_changes(
    stage_c: Mapping[str, LowRank], layers: Mapping[str, tuple[int, ...]]
) -> dict[str, LowRank]:
    """The changes by published layer."""
    changes = {layer: change for layer, change in stage_c.items() if not layer.endswith(QKV)}
    for layer in layers:
        block = layer.removesuffix(FUSED)
        parts = {part: stage_c[block + part] for part in QKV if block + part in stage_c}
        if layer.endswith(FUSED) and parts:
            changes[layer] = fuse(parts, layers[layer][0] // 3)
    return changes


def _numbered(change: LowRank, layer: str, rank: int) -> dict[str, Tensor]:
    """{down: (rank, c_in), up: (c_out, rank)} with ΔW = up @ down / rank, padded with zeros up to this rank."""
    down, up = change.down, change.up
    if layer.endswith("depthwise"):
        if len(up) == 1 or not torch.equal(down, down[..., :1, :1].expand_as(down)):
            raise CascadeError(
                f"{layer} has a change of its own for each position of its kernel, which an official LoRA cannot hold; "
                "choose another dialect."
            )
        down = down[..., 0, 0]
    down, up = down.flatten(1), exact_product(up.flatten(1), change.scale * rank)
    missing = rank - change.rank
    if missing:
        down = torch.cat([down, down.new_zeros(missing, down.shape[1])])
        up = torch.cat([up, up.new_zeros(len(up), missing)], dim=1)
    return {"down": down, "up": up}
