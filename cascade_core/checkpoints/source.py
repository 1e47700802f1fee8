"""Reads the tensors of one network from a file of any layout, from shards, or from a folder of diffusers."""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import CascadeError, printable, quoted
from ..networks.inference import stated_table
from ..networks.quantisation import QuantisedWeight
from .carried import carried_metadata, is_carried
from .control_blocks import stated_blocks
from .files import read_header, read_json, read_safetensors
from .foreign import foreign_name
from .layouts import Layout, parts_in
from .quantised import as_float, is_beside, quantisation, split_quantised

# Subfolders of each network in diffusers' folders, in the order of search; `prior_…` are those of the combined
# pipeline.
SUBFOLDERS = {
    "stage_c": ("prior", "prior_prior", "prior_lite"),
    "stage_b": ("decoder", "decoder_lite"),
    "stage_a": ("vqgan",),
    "text": ("text_encoder", "prior_text_encoder"),
    "vision": ("image_encoder", "prior_image_encoder"),
}
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.)")  # a shard's number, before the extension or a variant
MOST_SHARDS = 1000
_WEIGHT_NAMES = ("model", "diffusion_pytorch_model")
# Entries of a config.json beside diffusers' weights that cannot be inferred from shapes: its names -> published names.
_UNET_CONFIG = {
    "num_attention_heads": "nhead", "timestep_conditioning_type": "t_conds", "in_channels": "c_in",
    "out_channels": "c_out", **{name: name for name in ("patch_size", "self_attn", "switch_level", "dropout", "nhead",
                                                         "t_conds", "c_in", "c_out")},
}  # fmt: skip
_DIFFUSERS_CONFIGS = {
    "stage_c": _UNET_CONFIG,
    "stage_b": _UNET_CONFIG,
    "stage_a": {"scale_factor": "scale_factor"},
}


def read_weights(path: str | Path, part: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of one network, under published names, as views of mapped files.

    path: a safetensors file, a shard or an index of shards, or a folder of diffusers; part: of `layouts.SIGNATURES`.
    If the metadata has no `config`, it gets the config.json that belongs to the weights. A file without such a
    network is returned unchanged, so that the caller can say what it holds instead. Raises CascadeError where files
    are missing or damaged.
    """
    weights, quantised, metadata = read_quantised(path, part)
    return {**weights, **{name: as_float(weight) for name, weight in quantised.items()}}, metadata


def read_quantised(
    path: str | Path, part: str
) -> tuple[dict[str, Tensor], dict[str, QuantisedWeight], dict[str, str]]:
    """As `read_weights`, but returns the file's 8-bit weights and their scales separately, as stored."""
    tensors, metadata, parts = read_named(path, part)
    if part not in parts:
        return tensors, {}, metadata
    weights, quantised = split_quantised(Path(path).name, parts[part].to_published(tensors))
    return {name: t for name, t in weights.items() if not is_counter(name, t)}, quantised, metadata


class NamedTensors(NamedTuple):
    """The tensors of a file under its own names, its metadata, and the networks in it with their layouts."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    parts: dict[str, Layout]

    def stored(self, part: str) -> dict[str, Tensor]:
        """A network's own tensors under published names, as stored, without scales and trainers' counters."""
        published = self.parts[part].to_published(self.tensors)
        return {name: t for name, t in published.items() if not (is_beside(name) or is_counter(name, t))}


def read_named(path: str | Path, part: str) -> NamedTensors:
    """Reads weights under the file's own names, as stored. Raises CascadeError as `read_weights` does."""
    located = locate(path, part)
    tensors, metadata = read_tensors(located)
    carried = {name: tensor for name, tensor in tensors.items() if is_carried(name)}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in carried}
    scheme = quantisation(tensors, metadata)
    if scheme is not None and foreign_name(tensors) is None:
        raise CascadeError(
            f"{located.name} holds {scheme}, which is not read; choose the network in bf16, fp16, float32, fp8 or int8 "
            "(with scales)."
        )
    if "_class_name" in (config := stated_table(metadata)):  # diffusers' config.json stored in the header
        metadata = {**metadata, "config": "", **_as_published(config, part)}
    if not metadata.get("config") and in_model_folder(path):
        metadata = {**metadata, **_config_beside(located, part)}
    if part == "controlnet" and not metadata.get("config"):
        metadata = {**metadata, **stated_blocks(located, metadata)}
    parts = parts_in(tensors)
    if len(parts) > 1:  # a config in the metadata describes the network of a file that has only one
        metadata = {name: text for name, text in metadata.items() if name != "config"}
    if carried and part in parts:
        metadata = {**metadata, **carried_metadata(carried, parts[part].prefix)}
    return NamedTensors(tensors, metadata, parts)


def is_counter(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is a trainer's single number, such as `step`; BatchNorm's counters belong to the network."""
    return (tensor.ndim == 0 and not name.endswith(".num_batches_tracked")) or (
        tensor.numel() == 1 and "." not in name
    )


def in_model_folder(path: str | Path) -> bool:
    """Whether files beside the weights belong to them: the path is a folder, or a file with a name usual in model
    folders.

    A file with any other name may lie in a folder of many models.
    """
    path = Path(path)
    return os.path.isdir(path) or path.name.startswith(_WEIGHT_NAMES)


def _config_beside(weights: Path, part: str) -> dict[str, str]:
    """{config: JSON} with the entries of config.json in published names; empty without such a file."""
    path = weights.with_name("config.json")
    if part not in SUBFOLDERS or not path.exists():
        return {}
    return _as_published(read_json(path), part)


def _as_published(config: Mapping[str, Any], part: str) -> dict[str, str]:
    names = _DIFFUSERS_CONFIGS.get(part)
    if names is not None:
        config = {ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None}
    return {"config": json.dumps(config)} if config else {}


def networks_in(path: str | Path) -> set[str]:
    """The parts that a file or a folder of diffusers holds."""
    path = Path(path)
    if not os.path.isdir(path):
        return set(parts_in(read_tensors(path)[0]))
    return {
        part for part in SUBFOLDERS if (located := locate(path, part)).is_file() and _holds(located, part)
    }


def networks_stored(path: str | Path) -> dict[str, tuple[str, dict[str, Tensor]]]:
    """{part: (name of its layout, its tensors on the meta device)} of a file or a folder of diffusers.

    Only headers are read. Raises CascadeError as `read_safetensors` does.
    """
    stored = {}
    for part in SUBFOLDERS if os.path.isdir(path) else ("",):
        located = locate(path, part)
        if os.path.isdir(located):
            continue
        tensors = read_shapes(located)
        for inside, layout in parts_in(tensors).items():
            if inside == (part or inside):
                own = {
                    name: t
                    for name, t in tensors.items()
                    if layout.published_name(name) and not is_beside(name)
                }
                stored[inside] = layout.name, own
    return stored


def _holds(path: Path, part: str) -> bool:
    return part in parts_in(read_tensors(path)[0])


def locate(path: str | Path, part: str) -> Path:
    """The file of a part: the path itself, or the only weights in that folder or in its subfolder for the part.

    Of several precisions in a folder, the full one is taken, whose name has no variant. A folder without weights is
    returned unchanged.
    """
    path = Path(path)
    if not os.path.isdir(path):  # unlike Path.is_dir, False for a name that is too long
        return path
    for folder in (*(path / name for name in SUBFOLDERS.get(part, ())), path):
        if folder.is_dir():
            weights = _weights_in(folder)
            if weights is not None:
                return weights
    return path


def _weights_in(folder: Path) -> Path | None:
    """The folder's only weights, or the ones under diffusers' and transformers' names; shards by their index."""
    whole = [file for file in folder.glob("*.safetensors") if not _SHARD.search(file.name)]
    files = [*whole, *_indices_in(folder)]
    named = [file for file in files if file.name.split(".")[0] in _WEIGHT_NAMES]
    stems = {file.name.split(".")[0] for file in files}
    if not named and len(stems) != 1:
        return None

    def order(file: Path) -> tuple:
        variant = _name_and_variant(file)[1]
        return len(variant), variant, file not in whole, file.name

    return min(named or files, key=order)


def _indices_in(folder: Path) -> list[Path]:
    """The indices of shards in a folder: `….safetensors.index.json`, with a variant in any place."""
    return [file for file in folder.glob("*.json") if {"safetensors", "index"} <= set(file.name.split("."))]


def _name_and_variant(file: Path) -> tuple[str, str]:
    """("diffusion_pytorch_model", "bf16") of a file of weights, of a shard or of an index, with "" for no variant."""
    stem, *words = _SHARD.sub("", file.name).split(".")
    return stem, ".".join(word for word in words if word not in ("safetensors", "index", "json"))


def is_shard(path: Path) -> bool:
    """Whether a file is named as one of several shards."""
    return _SHARD.search(path.name) is not None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file, or of all the shards that belong to it."""
    index = _index_of(path)
    return read_safetensors(path) if index is None else _read_shards(index, read_safetensors)


def read_shapes(path: Path) -> dict[str, Tensor]:
    """All tensors of a file or of its shards, on the meta device; only headers are read."""
    index = _index_of(path)
    return read_header(path).tensors if index is None else _read_shards(index, read_header)[0]


def _index_of(path: Path) -> Path | None:
    """The index file that a path names, or that a shard belongs to; None for a single file."""
    if path.suffix == ".json":
        return path if path in _indices_in(path.parent) else None
    if not _SHARD.search(path.name):
        return None
    name = _name_and_variant(path)
    return next((index for index in _indices_in(path.parent) if _name_and_variant(index) == name), None)


def _read_shards(index: Path, read: Callable[[Path], tuple]) -> tuple[dict[str, Tensor], dict[str, str]]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise CascadeError(
            f"{index} is not the index of a sharded checkpoint (expected JSON with a weight_map); download it again."
        )
    files = set(places.values())
    if len(files) > MOST_SHARDS:
        raise CascadeError(
            f"{index} names {len(files)} shards, but {MOST_SHARDS} at most are read; download it again."
        )
    shards = {}
    for file in sorted(files):
        if Path(file).name != file or not file.isprintable():
            raise CascadeError(
                f"{index} names the shard {quoted(file)}, which is not beside it; download it again."
            )
        if not os.path.isfile(index.parent / file):
            raise CascadeError(
                f"{index} names {printable(file)}, which is missing: {len(files)} shards belong together; download it "
                "too."
            )
        shards[file] = read(index.parent / file)[0]
    absent = [name for name, file in places.items() if name not in shards[file]]
    if absent:
        raise CascadeError(
            f"{places[absent[0]]} lacks {printable(absent[0])}, which {index.name} says it holds; download it again."
        )
    return {name: shards[file][name] for name, file in places.items()}, {}
