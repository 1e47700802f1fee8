"""`--set NODE.INPUT=VALUE`, and the columns of a batch: values put into a graph before it runs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
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
        name = f"--set {quoted(assignment)}"
        if not equals or (target not in SEED_INPUTS and not is_target(target)):
            raise CascadeError(f"{name} is not NODE.INPUT=VALUE, such as 3.steps=20.")
        _assign(graph, target, input_types, partial(_read_value, name, text))
    check_shape(graph, "The graph with the values of --set")
    return graph


def assign_values(graph: Graph, values: Mapping[str, Any], input_types: InputTypes) -> Graph:
    """`assign` with values by `NODE.INPUT`, as in a table: a text is taken literally where the input takes text."""
    graph = copy.deepcopy(graph)
    targets: dict[tuple[str, str], str] = {}
    for target, value in values.items():
        if target not in SEED_INPUTS and not is_target(target):
            raise CascadeError(f"{quoted(target)} is not NODE.INPUT, such as 3.steps, nor seed or name.")
        place = _assign(graph, target, input_types, partial(_table_value, quoted(target), value))
        if place is not None and (earlier := targets.setdefault(place, target)) != target:
            raise CascadeError(
                f"{quoted(earlier)} and {quoted(target)} are one input, {quoted(place[1])} of node "
                f"{name_of(graph, place[0])}; give one of them."
            )
    check_shape(graph, "The graph with the values of the row")
    return graph


def is_target(text: str) -> bool:
    """Whether a text is NODE.INPUT."""
    node, dot, name = text.rpartition(".")
    return bool(dot and node and name)


def _assign(
    graph: Graph, target: str, input_types: InputTypes, read: Callable[[str | None], Any]
) -> tuple[str, str] | None:
    """Sets one input, and returns its node's id and its name; or all seeds.

    read: gives the value for an input of a type (None: unknown).
    """
    if target in SEED_INPUTS:
        return _assign_seeds(graph, read)
    node, _, name = target.rpartition(".")
    node_id = _find_node(graph, node)
    types = input_types(str(graph[node_id].get("class_type")))
    if types is not None and name not in types:
        raise CascadeError(
            f"Node {name_of(graph, node_id)} has no input {quoted(name)}; its inputs: {_listed(types)}."
        )
    graph[node_id]["inputs"][name] = read((types or {}).get(name))
    return node_id, name


def _assign_seeds(graph: Graph, read: Callable[[str | None], Any]) -> None:
    """Sets every seed that is not connected."""
    seeds = [
        (node["inputs"], name)
        for node in graph.values()
        for name in SEED_INPUTS
        if name in node["inputs"] and not is_link(node["inputs"][name])
    ]
    if not seeds:
        raise CascadeError("The graph has no seed to set; name the node and its input, such as 3.steps=20.")
    for inputs, name in seeds:
        inputs[name] = read("INT")


def _find_node(graph: Graph, name: str) -> str:
    if name in graph:
        return name
    for key in (_class_of, title_of):
        matches = [node_id for node_id, node in graph.items() if key(node) == name]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise CascadeError(
                f"Several nodes are called {quoted(name)} (ids {_listed(matches)}); name one by its id."
            )
    nodes = _listed(name_of(graph, node_id) for node_id in graph)
    raise CascadeError(f"The graph has no node {quoted(name)} (id, class or title); its nodes: {nodes}.")


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f", … ({len(names)} in all)" if len(names) > _MOST_NAMES else ""
    return ", ".join(printable(name, 200) for name in names[:_MOST_NAMES]) + more or "none"


def _class_of(node: dict[str, Any]) -> object:
    return node.get("class_type")


def _table_value(name: str, value: Any, input_type: str | None) -> Any:
    if not isinstance(value, str):
        number = isinstance(value, int | float)  # kept as text, since a prompt may be 7
        return _typed(name, json.dumps(value) if number and input_type == "STRING" else value, input_type)
    # A cell of a CSV file is a text, also where the input takes a number; a prompt may look like one.
    as_json = input_type in (None, "INT", "FLOAT", "BOOLEAN")
    return _read_value(name, value, input_type) if as_json else value


def _read_value(name: str, text: str, input_type: str | None) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # not JSON, or JSON that cannot be an input's value
        value = text
    if input_type == "STRING" and not isinstance(value, (str, list)):
        return text  # a prompt may be "1.50" or "true"
    return _typed(name, value, input_type)


def _typed(name: str, value: Any, input_type: str | None) -> Any:
    try:
        if input_type == "INT" and isinstance(value, float):
            return whole_number(value)
        if input_type == "BOOLEAN" and isinstance(value, str):
            return truth(value)
    except ValueError as error:
        raise CascadeError(f"{name}: {error}.") from None
    return value
