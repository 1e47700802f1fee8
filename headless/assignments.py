"""`--set NODE.INPUT=VALUE`: values put into a graph before it runs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..cascade_core.errors import CascadeError, printable, quoted
from .graph import Graph, check_shape, is_link, name_of, title_of, truth, whole_number
from .seeds import SEED_INPUTS

_MOST_NAMES = 20  # in a message

# class_type -> {input name: type}, or None for an unknown class.
InputTypes = Callable[[str], Mapping[str, str] | None]


def assign(graph: Graph, assignments: Iterable[str], input_types: InputTypes) -> Graph:
    """Returns a copy of the graph with the values of `NODE.INPUT=VALUE` texts in place.

    NODE is an id, or a class_type or title that only one node has. VALUE is read as JSON, or taken literally
    where it is not JSON or the input takes text. `seed=VALUE` without a node is for each seed of the graph.
    Raises CascadeError for another form, an unknown node or input, or an ambiguous node.
    """
    graph = copy.deepcopy(graph)
    for assignment in assignments:
        target, equals, text = assignment.partition("=")
        if equals and target in SEED_INPUTS:
            _assign_seeds(graph, assignment, text)
            continue
        node, dot, name = target.rpartition(".")
        if not (equals and dot and node and name):
            raise CascadeError(f"--set {quoted(assignment)} is not NODE.INPUT=VALUE, such as 3.steps=20.")
        node_id = _find_node(graph, node)
        types = input_types(str(graph[node_id].get("class_type")))
        if types is not None and name not in types:
            raise CascadeError(
                f"Node {name_of(graph, node_id)} has no input {quoted(name)}; its inputs: {_listed(types)}."
            )
        graph[node_id]["inputs"][name] = _read_value(assignment, text, (types or {}).get(name))
    check_shape(graph, "The graph with the values of --set")
    return graph


def _assign_seeds(graph: Graph, assignment: str, text: str) -> None:
    """Gives each seed that is a value, and not connected, this one."""
    seeds = [
        (node["inputs"], name)
        for node in graph.values()
        for name in SEED_INPUTS
        if name in node["inputs"] and not is_link(node["inputs"][name])
    ]
    if not seeds:
        raise CascadeError("The graph has no seed to set; name the node and its input, such as 3.steps=20.")
    for inputs, name in seeds:
        inputs[name] = _read_value(assignment, text, "INT")


def _find_node(graph: Graph, name: str) -> str:
    if name in graph:
        return name
    for key in (_class_of, title_of):
        matches = [node_id for node_id, node in graph.items() if key(node) == name]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise CascadeError(
                f"Several nodes are called {quoted(name)} (ids {_listed(matches)}); use an id with --set."
            )
    nodes = _listed(name_of(graph, node_id) for node_id in graph)
    raise CascadeError(f"The graph has no node {quoted(name)} (id, class or title); its nodes: {nodes}.")


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f", … ({len(names)} in all)" if len(names) > _MOST_NAMES else ""
    return ", ".join(printable(name, 200) for name in names[:_MOST_NAMES]) + more or "none"


def _class_of(node: dict[str, Any]) -> object:
    return node.get("class_type")


def _read_value(assignment: str, text: str, input_type: str | None) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # not JSON, or JSON that cannot be an input's value
        value = text
    if input_type == "STRING" and not isinstance(value, (str, list)):
        return text  # a prompt may be "1.50" or "true"
    try:
        if input_type == "INT" and isinstance(value, float):
            return whole_number(value)
        if input_type == "BOOLEAN" and isinstance(value, str):
            return truth(value)
    except ValueError as error:
        raise CascadeError(f"--set {quoted(assignment)}: {error}.") from None
    return value
