"""Text and JSON of `cascade nodes`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from difflib import get_close_matches

from ..cascade_core.errors import CascadeError, quoted
from .registry import InputInfo, NodeClass, available_nodes, describe

_LONGEST_LIST = 12  # options of a Combo; longer lists are shortened


def list_nodes(ids: Sequence[str] = (), as_json: bool = False) -> str:
    """Lists all nodes, or those with these ids: inputs with types, defaults and limits, and outputs."""
    nodes = available_nodes()
    for node_id in ids:
        if node_id not in nodes:
            close = get_close_matches(node_id[:100], nodes, n=1)
            hint = f"did you mean {close[0]}?" if close else "`cascade nodes` lists them all."
            raise CascadeError(f"There is no node {quoted(node_id)}; {hint}")
    chosen = {node_id: nodes[node_id] for node_id in ids or nodes}
    if as_json:
        return json.dumps({node_id: cls.GET_NODE_INFO_V1() for node_id, cls in chosen.items()}, indent=2)
    return "\n\n".join(_describe_node(cls) for cls in chosen.values())


def _describe_node(cls: NodeClass) -> str:
    schema, info = cls.GET_SCHEMA(), describe(cls)
    lines = [f"{schema.node_id}  ({schema.display_name or schema.node_id}, {schema.category})"]
    if schema.description:
        lines.append(f"    {schema.description}")
    width = max((len(name) for name in info.inputs), default=0)
    lines += [f"    in   {name:{width}}  {_describe_input(entry)}" for name, entry in info.inputs.items()]
    for index, output in enumerate(schema.outputs or []):
        label = f"  {output.display_name}" if output.display_name else ""
        lines.append(f"    out  {index}: {output.io_type}{label}")
    return "\n".join(lines)


def _describe_input(entry: InputInfo) -> str:
    options = entry.options
    texts = [entry.type]
    choices = options.get("options")
    if choices is not None:
        count = f", … ({len(choices)} in all)" if len(choices) > _LONGEST_LIST else ""
        texts.append("one of " + (", ".join(map(str, choices[:_LONGEST_LIST])) or "(none found)") + count)
    if "default" in options:
        texts.append(f"default {options['default']!r}")
    if "min" in options or "max" in options:
        texts.append(f"{options.get('min', '')} to {options.get('max', '')}")
    if "step" in options:
        texts.append(f"step {options['step']}")
    if not entry.required:
        texts.append("optional")
    return ", ".join(texts)
