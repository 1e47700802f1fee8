"""Converts workflows of ComfyUI's canvas to graphs, as its front end does before it queues one.

A workflow identifies a node's widgets only by their order, so only nodes with known inputs can be converted.
https://github.com/Comfy-Org/ComfyUI_frontend, `graphToPrompt`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..cascade_core.errors import CascadeError, printable, quoted
from .graph import Graph
from .registry import InputInfo

# class_type -> {input name: its description}, in order, or None for an unknown class.
InputsOf = Callable[[str], Mapping[str, InputInfo] | None]

_WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
_NOTES = ("Note", "MarkdownNote")
_REROUTE, _PRIMITIVE = "Reroute", "PrimitiveNode"  # node types that exist only on the canvas
_GROUPS = ("workflow>", "workflow/")  # prefixes of a group node's name
_MUTED, _BYPASSED = 2, 4  # LiteGraph's modes
_SEEDS = ("seed", "noise_seed")  # followed by the canvas's widget `control_after_generate`
_AFTER_A_RUN = ("fixed", "increment", "decrement", "randomize")
_UPLOAD = "image"  # the upload button below a picture's name, saved as a widget


def is_workflow(value: object) -> bool:
    """Whether this is a workflow of the canvas, and not a graph in API format."""
    return isinstance(value, dict) and isinstance(value.get("nodes"), list)


def to_graph(workflow: dict[str, Any], name: str, inputs_of: InputsOf) -> Graph:
    """The graph in API format that the canvas would queue. Raises CascadeError for what cannot be converted here."""
    with _reading(name):
        return _Workflow(workflow, name, inputs_of).graph()


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turns errors of parsing a workflow into a sentence: its structure is not the canvas's."""
    try:
        yield
    except CascadeError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CascadeError(
            f"{name} has nodes and links, but not as ComfyUI's canvas saves them; there, choose File > Export (API) "
            "and run that file."
        ) from error


class _Workflow:
    def __init__(self, workflow: dict[str, Any], name: str, inputs_of: InputsOf):
        self.name, self.inputs_of = name, inputs_of
        self.nodes: dict[str, dict[str, Any]] = {str(node["id"]): node for node in workflow["nodes"]}
        subgraphs = (workflow.get("definitions") or {}).get("subgraphs") or []
        self.subgraphs = {subgraph["id"]: subgraph.get("name", "") for subgraph in subgraphs}
        # Where each link comes from; newer workflows write links as objects.
        self.origins: dict[Any, tuple[str, int]] = {}
        for link in workflow.get("links") or []:
            if isinstance(link, dict):
                self.origins[link["id"]] = (str(link["origin_id"]), int(link["origin_slot"]))
            else:
                self.origins[link[0]] = (str(link[1]), int(link[2]))

    def graph(self) -> Graph:
        return {
            node_id: self._node(node_id, node)
            for node_id, node in self.nodes.items()
            if node["type"] not in (*_NOTES, _REROUTE, _PRIMITIVE)
            and node.get("mode", 0) not in (_MUTED, _BYPASSED)
        }

    def _node(self, node_id: str, node: dict[str, Any]) -> dict[str, Any]:
        class_type = node["type"]
        group = self._group(class_type) if isinstance(class_type, str) else None
        if group is not None:
            raise CascadeError(
                f"{self.name} is a workflow of the canvas with {group} (id {printable(node_id, 80)}), which only the "
                "canvas can expand; there, choose File > Export (API) and run that file."
            )
        declared = self.inputs_of(class_type) if isinstance(class_type, str) else None
        if declared is None:
            raise CascadeError(
                f"{self.name} is a workflow of the canvas with a node {quoted(class_type)} (id "
                f"{printable(node_id, 80)}), which is not known here; run with --server, on a ComfyUI that has it, or "
                "choose File > Export (API) there."
            )
        inputs = _widget_values(node.get("widgets_values"), declared)
        for socket in node.get("inputs") or []:
            if socket.get("link") is None:
                continue
            value = self._source(socket["link"])
            if value is not None:
                inputs[socket["name"]] = value
            elif socket["name"] in inputs and "widget" not in socket:
                del inputs[socket["name"]]
        title = node.get("title")
        return {
            "class_type": class_type,
            "inputs": inputs,
            **({"_meta": {"title": title}} if isinstance(title, str) else {}),
        }

    def _group(self, class_type: str) -> str | None:
        """A node's kind, in words, if it contains other nodes and exists only on the canvas; else None.

        Versions of the canvas save the widgets' values of such nodes in different places, so none is trusted.
        """
        if class_type in self.subgraphs:
            return f"the subgraph {quoted(self.subgraphs[class_type])}"
        return f"the group node {quoted(class_type[9:])}" if class_type.startswith(_GROUPS) else None

    def _source(self, link: Any) -> Any:
        """The source of a link: [node id, output] behind reroutes and bypassed nodes, a primitive's value, or None."""
        passed = set()
        while link is not None and link not in passed:
            passed.add(link)
            node_id, slot = self.origins.get(link, ("", 0))
            node = self.nodes.get(node_id)
            if node is None or node.get("mode") == _MUTED:
                return None
            if node["type"] == _PRIMITIVE:
                return node["widgets_values"][0]
            if node["type"] == _REROUTE:
                link = node["inputs"][0].get("link")
            elif node.get("mode") == _BYPASSED:
                link = _bypass(node, slot)
            else:
                return [node_id, slot]
        return None


def _bypass(node: dict[str, Any], slot: int) -> Any:
    """The link that a bypassed node passes on: that of the same index if types match, else the first that does."""
    inputs, kind = node.get("inputs") or [], node["outputs"][slot]["type"]
    for socket in [*inputs[slot : slot + 1], *inputs]:
        if socket.get("type") == kind:
            return socket.get("link")
    return None


def _widget_values(values: Any, declared: Mapping[str, InputInfo]) -> dict[str, Any]:
    """{widget: value} of a node, by order or by name; a widget missing in the workflow gets its default."""
    widgets = {
        name: entry
        for name, entry in declared.items()
        if entry.type in _WIDGETS and not entry.options.get("forceInput")
    }
    defaults = {name: _default(entry) for name, entry in widgets.items()}
    if isinstance(values, dict):
        return {name: values.get(name, default) for name, default in defaults.items()}
    remaining, inputs = list(values or []), {}
    for name, entry in widgets.items():
        inputs[name] = remaining.pop(0) if remaining else defaults[name]
        controlled = name in _SEEDS or entry.options.get("control_after_generate")
        if remaining and (
            (controlled and remaining[0] in _AFTER_A_RUN)
            or (entry.options.get("image_upload") and remaining[0] == _UPLOAD)
        ):
            remaining.pop(0)
    return inputs


def _default(entry: InputInfo) -> Any:
    """A widget's value on a new node."""
    options = entry.options.get("options") or [None]
    return entry.options.get("default", options[0] if entry.type == "COMBO" else None)
