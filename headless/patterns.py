"""Fills in patterns of a `filename_prefix`, as ComfyUI's canvas does before it queues a graph.

`%date:yyyy-MM-dd%` is the time, `%KSampler.seed%` the value of a node's input, by class or title. Patterns of
SaveImage itself, such as %width%, and unknown ones are left unchanged.
Source: `applyTextReplacements` and `formatDate` in https://github.com/Comfy-Org/ComfyUI_frontend
"""

from __future__ import annotations

import re
import time
from typing import Any

from ..cascade_core.file_names import LONGEST_NAME, LONGEST_PATH
from .graph import Graph, title_of

_PATTERN = re.compile(r"%([^%]+)%")
_DATE_PART = re.compile(r"dd?|MM?|hh?|mm?|ss?|yyy?y?")
_NOT_IN_NAMES = re.compile(r'[/?<>\\:*|"\x00-\x1f\x7f]')


def fill_in_prefixes(graph: Graph) -> Graph:
    """Returns the graph with the patterns of its filename prefixes filled in.

    A prefix too long for a path is left unchanged, and a value too long for a name is cut, though not below that
    length: saving refuses both.
    """
    now, nodes = time.localtime(), _nodes_by_name(graph)

    def fill_in(match: re.Match[str]) -> str:
        if match[1].startswith("date:"):
            return _format_date(match[1].removeprefix("date:"), now)
        name, _, input_name = match[1].partition(".")
        value = _as_text(nodes[name]["inputs"].get(input_name)) if name in nodes else None
        return match[0] if value is None else _NOT_IN_NAMES.sub("_", value[: LONGEST_NAME + 1])

    filled = {}
    for node_id, node in graph.items():
        prefix = node["inputs"].get("filename_prefix")
        if isinstance(prefix, str) and len(prefix) <= LONGEST_PATH:
            node = {**node, "inputs": {**node["inputs"], "filename_prefix": _PATTERN.sub(fill_in, prefix)}}
        filled[node_id] = node
    return filled


def _format_date(form: str, date: time.struct_time) -> str:
    parts = {"d": date.tm_mday, "M": date.tm_mon, "h": date.tm_hour, "m": date.tm_min, "s": date.tm_sec}

    def fill_in(match: re.Match[str]) -> str:
        part = match[0]
        if part[0] == "y":
            return part if len(part) == 3 else str(date.tm_year)[-len(part) :]
        return str(parts[part[0]]).zfill(len(part))

    return _DATE_PART.sub(fill_in, form)


def _nodes_by_name(graph: Graph) -> dict[str, dict[str, Any]]:
    """The first node of each class, and of each title that is not also a class."""
    last_first = list(reversed(graph.values()))
    by_title = {title: node for node in last_first if isinstance(title := title_of(node), str)}
    by_class = {name: node for node in last_first if isinstance(name := node.get("class_type"), str)}
    return by_title | by_class


def _as_text(value: Any) -> str | None:
    """An input's value as the canvas writes it; None for a link or a missing input."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int) and value.bit_length() > 64:  # no input takes it; Python may refuse to print it
        return None
    return str(value) if isinstance(value, (str, int, float)) else None
