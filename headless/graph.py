"""API-format graphs: `{node id: {"class_type": …, "inputs": {name: value or [node id, output index]}}}`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..cascade_core.errors import CascadeError, printable, quoted
from ..cascade_core.reading import open_regular

LARGEST_FILE = 64 * 2**20  # bytes; graphs have thousands
_LARGEST_BITS = 1024  # of a number; Python refuses to print one of thousands of digits
DEEPEST = 50  # levels of lists and objects within each other; a graph has four or five

Graph = dict[str, dict[str, Any]]

_TRUTHS = {"true": True, "false": False}


def read_bytes(path: Path) -> bytes:
    """The content of a file that may be a graph. Raises CascadeError where it is missing or too large."""
    name = printable(str(path))
    try:
        with open_regular(path) as file:
            content = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CascadeError(f"Cannot read the graph {name}: {reason}.") from error
    if len(content) > LARGEST_FILE:
        raise CascadeError(
            f"{name} is larger than {LARGEST_FILE // 2**20} MiB, so it is not taken for a graph."
        )
    return content


def parse_json(content: bytes | str, name: str) -> Any:
    """The value of a JSON text. Raises CascadeError for invalid JSON; name: of its source, for the message."""
    try:
        return json.loads(content)  # UTF-8, -16 or -32, with or without a byte order mark
    except UnicodeDecodeError as error:
        raise CascadeError(f"{name} is not a text file; a graph in API format is JSON.") from error
    except json.JSONDecodeError as error:
        position = f"line {error.lineno}, column {error.colno}"
        raise CascadeError(f"{name} is not valid JSON: {error.msg} at {position}.") from error
    except ValueError as error:  # a number of thousands of digits
        raise CascadeError(f"{name} holds a number of too many digits to be read.") from error
    except RecursionError as error:
        raise CascadeError(f"{name} is nested too deeply to be a graph.") from error


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every program reads: null in place of NaN and infinity, as a browser writes them."""
    plain = json.loads(json.dumps(value), parse_constant=lambda name: None)
    return json.dumps(plain, indent=indent)


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
        if not isinstance(node_id, str):
            raise CascadeError(f"{name}: a node has the id {quoted(node_id)}, but an id is a text.")
        if not isinstance(node, dict):
            raise CascadeError(
                f"{name}: node {printable(node_id, 80)} is {_json_kind(node)}, but an object was expected."
            )
        if not isinstance(node.get("inputs"), dict):
            raise CascadeError(
                f'{name}: node {printable(node_id, 80)} has no "inputs" object (it may be empty).'
            )
    check_json(graph, name)


def check_json(graph: dict[str, Any], name: str) -> None:
    """Raises CascadeError where a graph is nested too deeply to be copied, or holds values that JSON does not have."""
    # Containers of one level, each once even if it is referenced in many places.
    containers: dict[int, Any] = {id(graph): graph}
    for _ in range(DEEPEST):
        inner: dict[int, Any] = {}
        for container in containers.values():
            for value in container if isinstance(container, list) else (*container, *container.values()):
                if isinstance(value, dict | list):
                    inner[id(value)] = value
                elif not isinstance(value, str | int | float | None):
                    raise CascadeError(f"{name} holds {quoted(value)}, which is not a value that JSON has.")
                elif isinstance(value, int) and value.bit_length() > _LARGEST_BITS:
                    raise CascadeError(
                        f"{name} holds a number of {value.bit_length():,} bits; no input takes one."
                    )
        if not inner:
            return
        containers = inner
    raise CascadeError(f"{name} is nested too deeply to be a graph.")


def _json_kind(value: object) -> str:
    kinds = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def is_link(value: object) -> bool:
    """Whether an input's value is `[node id, output index]`."""
    if not isinstance(value, list) or len(value) != 2:
        return False
    source, slot = value
    return isinstance(source, str) and isinstance(slot, int) and not isinstance(slot, bool)


def whole_number(value: Any) -> int:
    """A value converted for an INT input: 20, 20.0 or "20". Raises ValueError or TypeError for others, such as 1.5."""
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(f"{value} is not a whole number; give one such as 20")
    return int(value)


def truth(value: Any) -> bool:
    """A value converted for a BOOLEAN input; of texts only "true" and "false" are taken, since any is true."""
    if isinstance(value, str) and value.lower() not in _TRUTHS:
        raise ValueError(f"{quoted(value)} is neither true nor false; give true or false")
    return _TRUTHS[value.lower()] if isinstance(value, str) else bool(value)


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
    class_type = graph[node_id].get("class_type", "?")
    name = printable(class_type, 80) if isinstance(class_type, str) else quoted(class_type)
    return f"{printable(node_id, 80)} ({name})"


def title_of(node: dict[str, Any]) -> object:
    """A node's title on the canvas, which a graph in API format may lack."""
    meta = node.get("_meta")
    return meta.get("title") if isinstance(meta, dict) else None
