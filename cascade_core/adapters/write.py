"""Adapters written in any dialect, exactly or not at all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.files import write_safetensors
from ..errors import CascadeError, quoted
from ..networks.config import StageCConfig
from ..networks.stage_c import StageC
from ..text.clip import CLIP_TOKENS
from ..text.learned_tokens import LearnedToken
from ..writing import replacing
from .adapter import Adapter
from .changes import AddedChange, LowRank
from .compatibility import check_fits
from .dialects import DIALECTS, Dialect
from .fused import exact_product
from .lycoris import algorithm_in_file, tensors_of
from .names import layer_of
from .official import HEADER, is_new, joined_tokens, write_official
from .order import SIZES
from .peft import HEADER_ENTRY

PARTS = {
    "stage_c": {},
    "stage_b": {},
    "text": {},
    "tokens": (),
}  # the parts that can be left out of an adapter, with their empty values


def write_adapter(
    path: str | Path,
    adapter: Adapter,
    dialect: str,
    stage_c: StageC | StageCConfig | None = None,
    vocabulary: int = CLIP_TOKENS,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = True,
    configuration: Path | None = None,
) -> None:
    """Writes the file as the dialect's program would, whole or not at all.

    metadata: the header of the file that the adapter comes from, kept except for entries of another dialect;
    overwrite: whether an existing file is replaced; configuration: path of PEFT's configuration, written before the
    tensors; None: not written; the other arguments are those of `to_dialect`.
    """
    tensors, header = to_dialect(adapter, dialect, stage_c, vocabulary)
    rest = {key: text for key, text in (metadata or {}).items() if key not in (*HEADER, HEADER_ENTRY)}
    if "train_tokens" in header:
        before = (metadata or {}).get("train_tokens", "[]")
        header["train_tokens"] = joined_tokens(before, header["train_tokens"])
    try:
        with replacing(configuration, overwrite) if configuration else nullcontext() as temporary:
            if temporary is not None:
                temporary.write_bytes(header[HEADER_ENTRY].encode())
            write_safetensors(path, tensors, {**rest, **header}, overwrite)
    except OSError as error:
        raise CascadeError(
            f"{configuration} could not be written ({error.strerror or error}); choose another folder."
        ) from None


def to_dialect(
    adapter: Adapter,
    dialect: str,
    stage_c: StageC | StageCConfig | None = None,
    vocabulary: int = CLIP_TOKENS,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of an adapter in a dialect of `DIALECTS`, no two tensors in the same memory.

    stage_c: the network whose layers the official dialect numbers, where it does not have a published size;
    vocabulary: number of tokens in the text encoder, after which the official dialect numbers new ones. Raises
    CascadeError for contents that the dialect cannot hold.
    """
    check_dialect(adapter, dialect)
    spoken = DIALECTS[dialect]
    if spoken.kind == "numbered":
        tensors, metadata = write_official(adapter, _config(adapter, stage_c), vocabulary)
    elif spoken.kind == "embedding":
        tensors, metadata = _token_tensors(adapter.tokens, "", ""), {}
    else:
        tensors, metadata = _named(adapter, spoken), {}
    if dialect == "peft":
        metadata = {HEADER_ENTRY: as_json(peft_config(tensors, spoken, str(spoken.stage_c)))}
    if dialect == "diffusers":
        metadata = {HEADER_ENTRY: as_json(_diffusers_config(tensors, spoken))}
    return _apart(tensors), {"format": "pt", **metadata}


def check_dialect(adapter: Adapter, dialect: str) -> None:
    """Raises CascadeError for a dialect that does not exist, and for contents of the adapter that it cannot hold."""
    if dialect not in DIALECTS:
        raise CascadeError(
            f"There is no LoRA dialect {quoted(dialect)}; choose one of {', '.join(DIALECTS)}."
        )
    reasons = obstacles(adapter, dialect)
    if reasons:
        able = [name for name in DIALECTS if not obstacles(adapter, name)]
        ways = [f"choose one that can ({', '.join(able)})"] if able else []
        for part, nothing in PARTS.items():
            less = replace(adapter, **{part: nothing})
            anything = less.stage_c or less.stage_b or less.text or less.tokens
            if getattr(adapter, part) and anything and not obstacles(less, dialect):
                ways.append(f"leave them out (--without {part} in cascade convert-lora)")
        ways = ways or ["bake it into its model with cascade merge, which can hold them"]
        raise CascadeError(
            f"{adapter.name} holds {', '.join(reasons)}, which the dialect {dialect} has no keys for; "
            f"{', or '.join(ways)}."
        )


def cautions(adapter: Adapter, dialect: str, in_folder: bool = False) -> list[str]:
    """Warnings, in sentences, about how programs will read an adapter in this dialect; it is written nevertheless.

    in_folder: whether it is written into a folder for PEFT
    """
    spoken = DIALECTS[dialect]
    notes = [spoken.caution] if spoken.caution and not in_folder else []
    changes = *adapter.stage_c.values(), *adapter.stage_b.values(), *adapter.text.values()
    added = [change for change in changes if isinstance(change, AddedChange)]
    by_row = [change.magnitude is not None and len(change.magnitude) > 1 for change in added]
    if spoken.for_comfyui and any(by_row):
        notes.append(
            "ComfyUI's own LoRA nodes measure DoRA's rows on the weights without the change, and make another picture "
            "of this file than its training did; Cascade LoRA Apply applies it as trained."
        )
    if dialect == "peft" and any(by_row) and not all(by_row):
        notes.append("PEFT takes DoRA for all layers or for none, and changes those without magnitudes too.")
    return notes


def peft_config(tensors: Mapping[str, Tensor], dialect: Dialect, network: str) -> dict[str, Any]:
    """PEFT's configuration of a LoRA whose alphas are multiplied in, so that each alpha is the rank; network: prefix
    of its layers' names.
    """
    tensors = {key.removeprefix(network): t for key, t in tensors.items() if key.startswith(network)}
    ranks = {
        key.removesuffix(dialect.down): len(tensor)
        for key, tensor in tensors.items()
        if key.endswith(dialect.down)
    }
    rank = Counter(ranks.values() or [1]).most_common(1)[0][0]
    others = {layer: other for layer, other in ranks.items() if other != rank}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "use_dora": any(key.endswith(str(dialect.row_magnitude)) for key in tensors),
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "base_model_name_or_path": None,
        "task_type": None,
    }


def _diffusers_config(tensors: Mapping[str, Tensor], dialect: Dialect) -> dict[str, Any]:
    """PEFT's configuration of each network in a file, as diffusers writes it."""
    networks = [prefix for prefix in (dialect.stage_c, dialect.text) if prefix is not None]
    configs = {network: peft_config(tensors, dialect, network) for network in networks}
    return {
        network + entry: value
        for network, config in configs.items()
        if config["target_modules"]
        for entry, value in config.items()
    }


def as_json(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2) + "\n"


def obstacles(adapter: Adapter, dialect: str) -> list[str]:
    """Lists, in words, the contents of an adapter that a dialect cannot hold; empty if it can hold everything."""
    spoken = DIALECTS[dialect]
    parts = adapter.stage_c, adapter.stage_b, adapter.text
    changes = [change for part in parts for change in part.values()]
    added = [change for change in changes if isinstance(change, AddedChange)]
    magnitudes = [change.magnitude for change in added if change.magnitude is not None]
    by_column = sum(len(magnitude) == 1 for magnitude in magnitudes)
    new = [token for token in adapter.tokens if token.index is None]
    numbered = spoken.kind == "numbered"
    names = {token.name for token in new}
    algorithms = [algorithm_in_file(*each) for part in parts for each in part.items()]
    unknown = [
        algorithm or "whole parameters"
        for algorithm in algorithms
        if algorithm not in (LowRank.algorithm, *spoken.algorithms)
    ]
    counts = {
        "layers of Stage C": len(adapter.stage_c) if spoken.stage_c is None else 0,
        "layers of Stage B": 0 if spoken.stage_b else len(adapter.stage_b),
        "layers of the text encoder": len(adapter.text) if spoken.text is None else 0,
        "DoRA magnitudes of rows": len(magnitudes) - by_column if spoken.row_magnitude is None else 0,
        "DoRA magnitudes of columns": by_column if spoken.column_magnitude is None else 0,
        "learned tokens": len(names) if spoken.tokens is None else 0,
        "changes of the vocabulary's tokens": 0 if numbered else len(adapter.tokens) - len(new),
        "tokens with several rows or at the encoder's output": sum(
            numbered and (token.output or len(token.vectors) > 1) for token in new
        ),
        "tokens whose names are in no brackets": sum(numbered and not is_new(token.name) for token in new),
        "tokens of one name": len(new) - len({(token.name, token.output) for token in new}),
        "several tokens": len(names) if spoken.kind == "embedding" and len(names) > 1 else 0,
    }
    counts |= {f"changes by {algorithm}": unknown.count(algorithm) for algorithm in dict.fromkeys(unknown)}
    return [f"{count} {things}" for things, count in counts.items() if count]


def _config(adapter: Adapter, stage_c: StageC | StageCConfig | None) -> StageCConfig:
    """The config of the Stage C whose layers are numbered: the given one, or a published one that the adapter fits."""
    if stage_c is not None:
        config = stage_c.config if isinstance(stage_c, StageC) else stage_c
        check_fits(adapter, config)
        return config
    for config in SIZES.values():
        try:
            check_fits(adapter, config)
        except CascadeError:
            continue
        return config
    raise CascadeError(
        f"{adapter.name} changes layers of a Stage C that is none of the published sizes ({', '.join(SIZES)}), and the "
        "official dialect numbers all of its layers; give the Stage C that it was made for."
    )


def _named(adapter: Adapter, dialect: Dialect) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for changes, name_of in (
        ({**adapter.stage_c, **adapter.stage_b}, dialect.stage_c_name),
        (adapter.text, dialect.written_text_name),
    ):
        for target, change in changes.items():
            name = name_of(layer_of(target))
            if isinstance(change, LowRank):
                tensors |= _change_tensors(name, change, dialect)
            else:
                tensors |= tensors_of(name, target, change, dialect.separator == "_")
    if dialect.tokens is not None:
        for name in dict.fromkeys(token.name for token in adapter.tokens):
            rows = [token for token in adapter.tokens if token.name == name]
            tensors |= _token_tensors(rows, dialect.tokens, f"{name}.")
    return tensors


def _change_tensors(name: str, change: LowRank, dialect: Dialect) -> dict[str, Tensor]:
    up = change.up if dialect.alpha is not None else exact_product(change.up, change.scale)
    tensors = {name + dialect.down: change.down, name + dialect.up: up}
    if dialect.alpha is not None:
        alpha = float(change.rank) if change.alpha is None else change.alpha
        tensors[name + dialect.alpha] = torch.tensor(alpha)
    if change.magnitude is not None:
        ending, magnitude = _magnitude(change.magnitude, change.down.ndim, dialect)
        tensors[name + ending] = magnitude
    return tensors


def _magnitude(magnitude: Tensor, dims: int, dialect: Dialect) -> tuple[str, Tensor]:
    """(ending, tensor) of a magnitude (c_out, 1) or (1, c_in) for a weight of `dims` dimensions."""
    ones = [1] * (dims - 2)
    if len(magnitude) == 1:
        return str(dialect.column_magnitude), magnitude.reshape(*magnitude.shape, *ones)
    bare = dialect.bare_magnitude
    shape = (
        [1, len(magnitude), *ones]
        if bare and ones
        else [len(magnitude)]
        if bare
        else [*magnitude.shape, *ones]
    )
    return str(dialect.row_magnitude), magnitude.reshape(shape)


def _token_tensors(tokens: Sequence[LearnedToken], prefix: str, name: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}clip_g{'_out' * token.output}": token.vectors for token in tokens}


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives each tensor its own memory, as the file format requires, since q, k and v may share a `down`."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.contiguous()
        if storage in seen and apart[name] is tensor:
            apart[name] = tensor.clone()
        seen.add(storage)
    return apart
