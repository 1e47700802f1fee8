"""Random weights of whole networks as files, written quickly: one block of random values is drawn and repeated."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade_nodes.cascade_core.checkpoints import NETWORKS, fuse_attention
from cascade_nodes.cascade_core.text.encoder import build_text_model

BLOCK = 8 << 20  # values; longer than any row and not a multiple of one, so that no two rows are equal
SPREAD = 0.02
NAMES = {torch.bfloat16: "BF16", torch.float16: "F16"}


def write_network(
    path: Path, kind: str, config: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16, sync: bool = True
) -> int:
    """Writes a network (or "text", CLIP's encoder) under published names. Returns the file's bytes.

    sync: wait until the bytes are on disk, so that they can be dropped from the cache.
    """
    with torch.device("meta"):
        if kind == "text":
            shapes = build_text_model(config).state_dict()
        else:
            shapes = fuse_attention(NETWORKS[kind].from_config(config).state_dict())
    return _write(path, shapes, dtype, {"kind": kind, "config": json.dumps(config)}, sync)


def _write(
    path: Path, shapes: Mapping[str, Tensor], dtype: torch.dtype, metadata: dict[str, str], sync: bool
) -> int:
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in shapes.items():
        start, end = end, end + tensor.numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for block in _blocks(end, dtype):
            file.write(block)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    return path.stat().st_size


def _blocks(size: int, dtype: torch.dtype) -> Iterator[memoryview]:
    values = torch.randn(BLOCK + 1, generator=torch.Generator().manual_seed(0)).mul_(SPREAD).to(dtype)
    block = values.view(torch.uint8).numpy().data
    while size > 0:
        yield block[:size]
        size -= len(block)
