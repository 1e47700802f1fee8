"""Checks every file of Stable Cascade: its checksum, its weights, its networks' outputs for fixed inputs."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...cascade_core.checkpoints import non_finite, parts_in, read_header, read_weights, split_attention
from ...cascade_core.checkpoints.source import SUBFOLDERS, is_shard
from ...cascade_core.errors import CascadeError, printable
from ...cascade_core.text.clip import PROJECTION, is_weight_of
from ...nodes.hosts import roles
from ...nodes.hosts.headless import folders
from ..catalogue import FILES, in_words
from ..models import FileNetwork, describe_network, networks_of
from .expected import differences, published_shapes
from .in_diffusers import outputs_in_diffusers
from .networks import difference, fixed_inputs, load_network, outputs_of, statistics
from .report import Report

if TYPE_CHECKING:
    from ..progress import TransferProgress

BLOCK = 1 << 24  # bytes that are hashed at once
LARGEST_DIFFERENCE = 1e-4  # from diffusers in float32, relative to the largest value
NOT_NETWORKS = ("lora", "embedding", "face")  # roles whose folders are left alone
_PARTS = {"text_encoder": "text"}  # parts of `checkpoints` whose roles have another name


def roots_of(folder: Path | None) -> list[Path]:
    """The given folder, or those where loaders look.  Raises CascadeError for a path that is not a folder."""
    if folder is None:
        return [root for root in folders.roots() if os.path.isdir(root)]
    if not os.path.isdir(folder):
        raise CascadeError(
            f"{printable(str(folder))} is not a folder; give the one that holds the model files."
        )
    return [folder]


def safetensors_in(folder: Path | None) -> list[Path]:
    """Each safetensors file once: anywhere in the given folder, else in the folders where loaders look for networks.

    Raises CascadeError where there is none.
    """
    categories = dict.fromkeys(
        category for role, names in roles.FOLDERS.items() if role not in NOT_NETWORKS for category in names
    )
    subfolders = ("",) if folder else [name for category in categories for name in roles.subfolders(category)]
    places = [root / subfolder for root in roots_of(folder) for subfolder in subfolders]
    paths = {
        path.resolve(): path
        for place in places
        for name in roles.names_in(place, "")
        for path in [place / name]
    }
    if not paths:
        looked_in = folder or ", ".join(map(str, folders.roots()))
        raise CascadeError(
            f"No safetensors file was found under {looked_in}; give the folder of the model files, or get the "
            "published ones by `cascade fetch`."
        )
    return list(paths.values())


def check_file(report: Report, path: Path, library: Any, progress: TransferProgress) -> None:
    """Adds a file and its networks to the report; a file of another model is only counted.

    library: diffusers, or None.  Raises CascadeError for a file that cannot be read.
    """
    header = read_header(path)
    if is_shard(path) or not parts_in(header.tensors):  # these networks were never published in shards
        report.data["others"] += 1
        return
    networks = [network for network in networks_of(path) if network.role != "checkpoint"]
    published = [
        file.name for file in FILES.values() if any(network.is_published(file) for network in networks)
    ]
    begun = time.perf_counter()
    entry: dict[str, Any] = {
        "file": shown_name(path),
        "size": path.stat().st_size,
        "sha256": _sha256(path, progress),
        "published": published,
        "networks": [],
    }
    entry["seconds"] = round(time.perf_counter() - begun, 2)
    report.data["files"].append(entry)
    if len(networks) == len(published) == 1:
        _check_digest(report, entry, published[0])
    for network in networks:
        part = _PARTS.get(network.role, network.role)
        with report.recording(f"{path.name} ({part})", path):
            _check_network(report, entry, path, part, network, library, progress)


def shown_name(path: Path) -> str:
    """A file's name; in a diffusers folder with the network's folder, since the files there have the same names."""
    known = {name for names in SUBFOLDERS.values() for name in names}
    return f"{path.parent.name}/{path.name}" if path.parent.name in known else path.name


def _check_digest(report: Report, entry: dict[str, Any], name: str) -> None:
    """Compares size and sha256 with the published file's, as far as the catalogue has them."""
    file = FILES[name]
    entry["published_size"], entry["published_sha256"] = in_words(file.size), file.sha256
    if file.sha256 and entry["sha256"] != file.sha256:
        report.add_problem(
            f"{entry['file']} holds the network of {name}, but is not the published file (whose sha256 begins with "
            f"{file.sha256[:16]}): it was converted, or is damaged."
        )


def _check_network(
    report: Report,
    entry: dict[str, Any],
    path: Path,
    part: str,
    network: FileNetwork,
    library: Any,
    progress: TransferProgress,
) -> None:
    progress.status(f"{progress.head}  {part}: weights")
    begun = time.perf_counter()
    tensors, _ = read_weights(path, part)
    weights = {name: tensor for name, tensor in tensors.items() if _belongs(name, part)}
    counts = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in weights.values())
    bad = list(non_finite(weights))
    stored: dict[str, Any] = {
        "part": part,
        "what": describe_network(path, network).removeprefix(f"{path.name} is "),
        "tensors": len(weights),
        "values": sum(tensor.numel() for tensor in weights.values()),
        "dtypes": dict(counts),
        "non_finite": len(bad),
        "as_published": _compare_names(report, path, part, network, weights),
        "seconds": {"weights": round(time.perf_counter() - begun, 2)},
    }
    del tensors, weights
    entry["networks"].append(stored)
    if bad:
        names = ", ".join(map(printable, bad[:3]))
        report.add_problem(
            f"{path.name} holds NaN or infinity in {len(bad)} weights, such as {names}; download it again."
        )
        return  # its outputs would be NaN too
    progress.status(f"{progress.head}  {part}: outputs for fixed inputs")
    begun = time.perf_counter()
    loaded = load_network(path, part)
    inputs = fixed_inputs(part, loaded)
    outputs = outputs_of(part, loaded, inputs)
    stored["seconds"]["outputs"] = round(time.perf_counter() - begun, 2)
    stored["outputs"] = {name: statistics(output) for name, output in outputs.items()}
    if not all(bool(output.isfinite().all()) for output in outputs.values()):
        report.add_problem(f"{path.name} ({part}) gives NaN or infinity, though none of its weights does.")
        return
    if library is not None:
        progress.status(f"{progress.head}  {part}: the same in diffusers")
        theirs = outputs_in_diffusers(library, part, loaded, inputs, path)
        _compare_outputs(report, stored, path, outputs, theirs or {})


def _compare_names(
    report: Report, path: Path, part: str, network: FileNetwork, weights: Mapping[str, Tensor]
) -> bool | None:
    """Whether names and shapes are the published file's; None for a network that was not published."""
    name = next((file.name for file in FILES.values() if network.is_published(file)), None)
    if name is None:
        return None
    shapes = {key: tuple(tensor.shape) for key, tensor in split_attention(weights).items()}
    expected = {key: shape for key, shape in published_shapes(name).items() if _belongs(key, part)}
    found = differences(shapes, expected)
    if found:
        report.add_problem(f"{path.name} differs from the published {name}: {'; '.join(found)}.")
    return not found


def _compare_outputs(
    report: Report,
    stored: dict[str, Any],
    path: Path,
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
) -> None:
    for name, output in theirs.items():
        apart = difference(ours[name], output)
        stored["outputs"][name]["diffusers"] = {**apart, **statistics(output)}
        if not float(apart["relative"]) <= LARGEST_DIFFERENCE:
            report.add_problem(
                f"{path.name} ({stored['part']}): {name} differs from diffusers' by {apart['relative']} of its largest "
                "value."
            )


def _belongs(name: str, part: str) -> bool:
    """Whether a tensor belongs to a part, since a file may hold both halves of CLIP."""
    return part not in PROJECTION or is_weight_of(name, part)


def _sha256(path: Path, progress: TransferProgress) -> str:
    digest, size, done = hashlib.sha256(), path.stat().st_size, 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            done += len(block)
            progress.bytes_arrived(done, size)
    return digest.hexdigest()
