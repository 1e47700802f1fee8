"""A file's metadata stored as tensors, for programs that save tensors alone, as ComfyUI does.

These tensors are stored with their network's weights, under its prefix, and only where the weights alone do not
determine the same.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..errors import CascadeError
from ..networks.inference import infer_config
from .files import MAX_HEADER

CONFIG, VOCABULARY = "cascade_config", "cascade_vocabulary"
# The metadata key that each is read back as.
METADATA_KEYS = {CONFIG: "config", VOCABULARY: VOCABULARY}


def as_tensor(table: Mapping[str, Any]) -> Tensor:
    """A table as the bytes of its JSON, (n,) uint8."""
    return torch.frombuffer(bytearray(json.dumps(table).encode()), dtype=torch.uint8)


def carried_config(network: Any) -> dict[str, Tensor]:
    """{CONFIG: …} of a network whose configuration cannot be inferred from its tensors' names and shapes, else {}."""
    config = network.config
    _, inferred = infer_config(network.state_dict())
    return {} if type(config).from_dict(inferred) == config else {CONFIG: as_tensor(asdict(config))}


def is_carried(name: str) -> bool:
    """Whether a tensor is stored metadata and not a weight."""
    return name.rpartition(".")[2] in METADATA_KEYS


def carried_metadata(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, str]:
    """The metadata that a network's carried tensors stand for, whatever precision they were cast to.

    prefix: of the network's names.  Raises CascadeError for bytes that are not text.
    """
    metadata = {}
    for name, key in METADATA_KEYS.items():
        tensor = tensors.get(prefix + name)
        if tensor is None:
            continue
        try:
            if tensor.ndim != 1 or tensor.numel() > MAX_HEADER:
                raise ValueError
            metadata[key] = tensor.to(torch.uint8).numpy().tobytes().decode("utf-8")
        except ValueError:
            raise CascadeError(
                f"{name} in the file is not a text in UTF-8 of at most {MAX_HEADER} bytes; save the network again."
            ) from None
    return metadata
