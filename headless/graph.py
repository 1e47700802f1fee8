"""API-format graphs: `{node id: {"class_type": …, "inputs": {name: value or [node id, output index]}}}`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..cascade_core.errors import CascadeError

Graph = dict[str, dict[str, Any]]


def read_graph(path: Path) -> Graph:
    """Reads the graph in a JSON file. The nodes themselves are checked by the validation.

    Raises CascadeError where the file is missing, not text, not JSON (with the line) or not a graph in API format.
    """
    try:
        graph = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CascadeError(f"Cannot read the graph {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise CascadeError(f"{path} is not a text file; a graph in API format is JSON.") from error
    except json.JSONDecodeError as error:
        position = f"line {error.lineno}, column {error.colno}"
        raise CascadeError(f"{path} is not valid JSON: {error.msg} at {position}.") from error
    except ValueError as error:  # an invalid file name, or a number of thousands of digits
        raise CascadeError(f"Cannot read the graph {str(path)!r}: {error}.") from error
    except RecursionError as error:
        raise CascadeError(f"{path} is nested too deeply to be a graph.") from error
    check_shape(graph, str(path))
    return graph


def check_shape(graph: object, name: str) -> None:
    """Raises CascadeError unless this can be a graph in API format."""
    if not isinstance(graph, dict):
        raise CascadeError(f"{name} holds {_json_kind(graph)}, but a graph is an object of nodes by id.")
    if isinstance(graph.get("nodes"), list):
        raise CascadeError(
            f"{name} is a workflow of ComfyUI's canvas; there, choose File > Export (API) and run that file."
        )
    if not graph:
        raise CascadeError(f"{name} holds no nodes.")
    for node_id, node in graph.items():
        if not isinstance(node, dict):
            raise CascadeError(f"{name}: node {node_id} is {_json_kind(node)}, but an object was expected.")
        if not isinstance(node.get("inputs"), dict):
            raise CascadeError(f'{name}: node {node_id} has no "inputs" object (it may be empty).')


def _json_kind(value: object) -> str:
    kinds = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def is_link(value: object) -> bool:
    """Whether an input's value is `[node id, output index]`."""
    if not isinstance(value, list) or len(value) != 2:
        return False
    source, slot = value
    return isinstance(source, str) and isinstance(slot, int) and not isinstance(slot, bool)


def linked_inputs(node: Mapping[str, Any], names: Iterable[str]) -> Iterator[tuple[str, str, int]]:
    """Yields (input, source node, output index) for each of these inputs that is connected."""
    for name in names:
        value = node["inputs"].get(name)
        if is_link(value):
            yield name, value[0], value[1]


def execution_order(sources: Mapping[str, list[str]], outputs: Iterable[str]) -> list[str]:
    """Sorts the nodes that the outputs need topologically.

    A node's longest branch comes first, so that a loader runs just before its first use and not everything is
    in memory at once. `sources`: {node: nodes that it takes from}, without cycles.
    """
    outputs = list(outputs)
    depth: dict[str, int] = {}
    for node_id in _depth_first(sources, outputs):
        depth[node_id] = 1 + max((depth[source] for source in sources[node_id]), default=0)
    longest_first = {
        node_id: sorted(sources[node_id], key=depth.__getitem__, reverse=True) for node_id in depth
    }
    return _depth_first(longest_first, outputs)


def _depth_first(sources: Mapping[str, list[str]], outputs: list[str]) -> list[str]:
    order: list[str] = []
    seen: set[str] = set()
    for output in outputs:
        stack = [(output, False)]
        while stack:
            node_id, expanded = stack.pop()
            if expanded:
                order.append(node_id)
            elif node_id not in seen:
                seen.add(node_id)
                stack.append((node_id, True))
                stack.extend((source, False) for source in reversed(sources[node_id]))
    return order


def name_of(graph: Graph, node_id: str) -> str:
    """Name of a node in messages: `3 (CascadePriorSampler)`."""
    return f"{node_id} ({graph[node_id].get('class_type', '?')})"
