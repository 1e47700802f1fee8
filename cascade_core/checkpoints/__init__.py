"""Checkpoint files: what they hold, how their names map to ours, and how they are read and written."""

from .attention import fuse_attention, split_attention
from .files import read_safetensors, write_safetensors
from .load import (
    KIND_NAMES,
    NETWORKS,
    describe,
    first_non_finite,
    holds,
    identify,
    load_model,
    load_published_state_dict,
)

__all__ = [
    "KIND_NAMES",
    "NETWORKS",
    "describe",
    "first_non_finite",
    "fuse_attention",
    "holds",
    "identify",
    "load_model",
    "load_published_state_dict",
    "read_safetensors",
    "split_attention",
    "write_safetensors",
]
