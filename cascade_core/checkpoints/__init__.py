"""Checkpoint files: their contents, the mapping of their names to ours, reading and writing."""

from .attention import fuse_attention, split_attention
from .files import check_writable, read_header, read_json, read_safetensors, read_text, write_safetensors
from .layouts import ALL_IN_ONE, DIFFUSERS, LAYOUTS, Layout, layout_named, parts_in
from .load import (
    KIND_NAMES,
    NETWORKS,
    PART_NAMES,
    check_weights,
    converted,
    describe,
    first_non_finite,
    heads_notice,
    holds,
    identify,
    load_model,
    load_published_state_dict,
    non_finite,
)
from .source import in_model_folder, locate, networks_in, networks_stored, read_named, read_weights

__all__ = [
    "ALL_IN_ONE",
    "DIFFUSERS",
    "KIND_NAMES",
    "LAYOUTS",
    "NETWORKS",
    "PART_NAMES",
    "Layout",
    "check_weights",
    "check_writable",
    "converted",
    "describe",
    "first_non_finite",
    "fuse_attention",
    "heads_notice",
    "holds",
    "identify",
    "in_model_folder",
    "layout_named",
    "load_model",
    "load_published_state_dict",
    "locate",
    "networks_in",
    "networks_stored",
    "non_finite",
    "parts_in",
    "read_header",
    "read_json",
    "read_named",
    "read_safetensors",
    "read_text",
    "read_weights",
    "split_attention",
    "write_safetensors",
]
