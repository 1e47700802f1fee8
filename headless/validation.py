"""Validation of a graph as ComfyUI does it on `POST /prompt`: same checks, same errors, same conversions.

The errors have ComfyUI 0.33's `error` and `node_errors` shape. Where ComfyUI stops with a KeyError of its own
(a link to a missing node or output) there is a proper error here. The checks of a node are local to it
(`node_checks`); errors that follow from others upstream are found by a traversal of the links.
"""

from __future__ import annotations

import copy
import traceback
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any

from .graph import Graph, check_shape, linked_inputs, name_of, title_of
from .node_checks import NodeCheck, check_node
from .registry import NodeClass, NodeInfo, describe

_MOST_FAILING = 50  # nodes whose errors are listed, each with the outputs that depend on it
_CYCLE_SHOWN = 10


@dataclass(frozen=True)
class Validation:
    """Outcome of a validation.

    graph        a copy, with values converted to their inputs' types ("20" -> 20 for an INT)
    nodes        the description of every node class in the graph
    outputs      the output nodes that can be executed
    error        the reason why nothing can be executed, as ComfyUI's `error`, or None
    node_errors  the faults by node id, as ComfyUI's `node_errors`; may be non-empty beside good outputs
    """

    graph: Graph
    nodes: dict[str, NodeInfo]
    outputs: list[str]
    error: dict[str, Any] | None
    node_errors: dict[str, dict[str, Any]]


def validate(graph: Graph, classes: Mapping[str, NodeClass]) -> Validation:
    """Checks a graph against the node classes. Raises CascadeError only for a value that is not a graph."""
    check_shape(graph, "The graph")
    graph = copy.deepcopy(graph)
    error = _first_unknown(graph, classes)
    if error is not None:
        return Validation(graph, {}, [], error, {})
    types = {node["class_type"] for node in graph.values()}
    nodes = {class_type: describe(classes[class_type]) for class_type in sorted(types)}
    outputs = [node_id for node_id, node in graph.items() if nodes[node["class_type"]].is_output]
    if not outputs:
        return Validation(graph, nodes, [], _error("prompt_no_outputs", "Prompt has no outputs", ""), {})
    return _LinkTraversal(graph, nodes).validate(outputs)


def sources_of(validation: Validation) -> dict[str, list[str]]:
    """{node: nodes that it takes from} over the declared inputs."""
    return {
        node_id: [source for _, source, _ in linked_inputs(node, validation.nodes[node["class_type"]].inputs)]
        for node_id, node in validation.graph.items()
    }


def _error(kind: str, message: str, details: str, **extra: Any) -> dict[str, Any]:
    return {"type": kind, "message": message, "details": details, "extra_info": extra}


def _first_unknown(graph: Graph, classes: Mapping[str, NodeClass]) -> dict[str, Any] | None:
    """The error of the first node whose class is missing or unknown."""
    for node_id, node in graph.items():
        details = f"Node ID '#{node_id}'"
        class_type = node.get("class_type")
        title = title_of(node)
        node_info = {"node_id": node_id, "class_type": class_type, "node_title": title or class_type}
        if not isinstance(class_type, str):
            message = f"Node '{title or f'ID #{node_id}'}' has no class_type."
            message += " The workflow may be corrupted or a custom node is missing."
            return _error("missing_node_type", message, details, **node_info)
        if class_type not in classes:
            message = f"Node '{title or class_type}' not found. The custom node may not be installed."
            return _error("missing_node_type", message, details, **node_info)
    return None


class _LinkTraversal:
    """Traversal of the links of a graph whose node classes are all known."""

    def __init__(self, graph: Graph, nodes: dict[str, NodeInfo]):
        self.graph = graph
        self.nodes = nodes
        self.checked: dict[str, NodeCheck] = {}
        self.consumers: defaultdict[str, list[str]] = defaultdict(list)
        self.cycle_errors: dict[str, dict[str, Any]] = {}

    def validate(self, outputs: list[str]) -> Validation:
        for output in outputs:
            self._visit(output)
        failing = [node_id for node_id in self.graph if node_id in self.checked and self._errors(node_id)]
        node_errors = {}
        for node_id in failing[:_MOST_FAILING]:
            dependent = self._downstream([node_id])
            node_errors[node_id] = {
                "errors": self._errors(node_id),
                "dependent_outputs": [output for output in outputs if output in dependent],
                "class_type": self.graph[node_id]["class_type"],
            }
        spoiled = self._downstream(failing)
        good = [output for output in outputs if output not in spoiled]
        error = None
        if not good:
            reasons = [reason for output in outputs for reason in self._errors(output)]
            details = "\n".join(f"{reason['message']}: {reason['details']}" for reason in reasons)
            error = _error("prompt_outputs_failed_validation", "Prompt outputs failed validation", details)
        return Validation(self.graph, self.nodes, good, error, node_errors)

    def _errors(self, node_id: str) -> list[dict[str, Any]]:
        cycle = self.cycle_errors.get(node_id)
        return ([cycle] if cycle else []) + self.checked[node_id].errors

    def _check(self, node_id: str, consumer: str = "", via: str = "") -> NodeCheck:
        """Checks a node once; it was first reached over the input `via` of `consumer`."""
        if node_id not in self.checked:
            try:
                self.checked[node_id] = check_node(node_id, self.graph, self.nodes)
            except Exception as error:  # a fault in a node's own validate_inputs is reported, as ComfyUI does
                self.checked[node_id] = NodeCheck([self._exception(error, consumer, via)], [])
        return self.checked[node_id]

    def _exception(self, error: Exception, consumer: str, via: str) -> dict[str, Any]:
        module, name = type(error).__module__, type(error).__qualname__
        extra = {
            "exception_type": name if module == "builtins" else f"{module}.{name}",
            "traceback": traceback.format_tb(error.__traceback__),
        }
        if not consumer:
            return _error(
                "exception_during_validation", "Exception when validating node", str(error), **extra
            )
        node = self.graph[consumer]
        entry = self.nodes[node["class_type"]].inputs[via]
        extra |= {
            "input_name": via,
            "input_config": (entry.type, entry.options),
            "exception_message": str(error),
            "linked_node": node["inputs"][via],
        }
        message = "Exception when validating inner node"
        return _error("exception_during_inner_validation", message, str(error), **extra)

    def _visit(self, output: str) -> None:
        """Checks the output and all nodes upstream over well-formed links, each once; records cycles on the way."""
        if output in self.checked:
            return
        path = {output: None}  # a dict: ordered, with fast lookup
        branches = [iter(self._check(output).sources)]
        while branches:
            via, source = next(branches[-1], ("", None))
            if source is None:
                path.popitem()
                branches.pop()
                continue
            consumer = next(reversed(path))
            self.consumers[source].append(consumer)
            if source in path:
                self._note_cycle(source, path)
            elif source not in self.checked:
                branches.append(iter(self._check(source, consumer, via).sources))
                path[source] = None

    def _downstream(self, node_ids: Iterable[str]) -> set[str]:
        """These nodes and all nodes downstream of them."""
        seen = set(node_ids)
        pending = list(seen)
        while pending:
            new = set(self.consumers[pending.pop()]) - seen
            seen |= new
            pending += new
        return seen

    def _note_cycle(self, start: str, path: Iterable[str]) -> None:
        if start in self.cycle_errors:  # the nodes of that cycle are already refused
            return
        cycle = list(dropwhile(lambda node_id: node_id != start, path))
        names = [name_of(self.graph, node_id) for node_id in (*cycle[:_CYCLE_SHOWN], start)]
        if len(cycle) > _CYCLE_SHOWN:
            names.insert(-1, f"… {len(cycle) - _CYCLE_SHOWN:,} more …")
        details, nodes = " -> ".join(names), cycle[:_MOST_FAILING]
        for node_id in nodes:
            extra = {"node_id": node_id, "cycle_nodes": nodes}
            error = _error("dependency_cycle", "Dependency cycle detected", details, **extra)
            self.cycle_errors.setdefault(node_id, error)
