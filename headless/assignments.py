"""`--set NODE.INPUT=VALUE`: values put into a graph before it runs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..cascade_core.errors import CascadeError
from .graph import Graph, name_of

# class_type -> {input name: type}, or None for an unknown class.
InputTypes = Callable[[str], Mapping[str, str] | None]


def assign(graph: Graph, assignments: Iterable[str], input_types: InputTypes) -> Graph:
    """Returns a copy of the graph with the values of `NODE.INPUT=VALUE` texts in place.

    NODE is an id, or a class_type or title that only one node has. VALUE is read as JSON, or taken literally
    where it is not JSON or the input takes text.
    Raises CascadeError for another form, an unknown node or input, or an ambiguous node.
    """
    graph = copy.deepcopy(graph)
    for assignment in assignments:
        target, equals, text = assignment.partition("=")
        node, dot, name = target.rpartition(".")
        if not (equals and dot and node and name):
            raise CascadeError(f"--set {assignment!r} is not NODE.INPUT=VALUE, such as 3.steps=20.")
        node_id = _find_node(graph, node)
        types = input_types(str(graph[node_id].get("class_type")))
        if types is not None and name not in types:
            input_names = ", ".join(types) or "none"
            raise CascadeError(
                f"Node {name_of(graph, node_id)} has no input {name!r}; its inputs: {input_names}."
            )
        graph[node_id]["inputs"][name] = _read_value(text, (types or {}).get(name))
    return graph


def _find_node(graph: Graph, name: str) -> str:
    if name in graph:
        return name
    for key in (_class_of, _title_of):
        matches = [node_id for node_id, node in graph.items() if key(node) == name]
        if len(matches) == 1:
            return matches[0]
        if matches:
            ids = ", ".join(matches)
            raise CascadeError(f"Several nodes are called {name!r} (ids {ids}); use an id with --set.")
    nodes = ", ".join(name_of(graph, node_id) for node_id in graph)
    raise CascadeError(f"The graph has no node {name!r} (id, class or title); its nodes: {nodes}.")


def _class_of(node: dict[str, Any]) -> object:
    return node.get("class_type")


def _title_of(node: dict[str, Any]) -> object:
    meta = node.get("_meta")
    return meta.get("title") if isinstance(meta, dict) else None


def _read_value(text: str, input_type: str | None) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # not JSON, or JSON that cannot be an input's value
        return text
    if input_type == "STRING" and not isinstance(value, (str, list)):
        return text  # a prompt may be "1.50" or "true"
    return value
