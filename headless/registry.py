"""Registry of the nodes, with a description of each for the host."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..nodes.api import io

NodeClass = type[io.ComfyNode]


@dataclass(frozen=True)
class InputInfo:
    """Input of a node: type, whether it is required, and its options as in ComfyUI's `/object_info`."""

    type: str
    required: bool
    options: dict[str, Any]


@dataclass(frozen=True)
class NodeInfo:
    """Node class as validation and execution see it. `checks` is its `validate_inputs`, if it has one."""

    cls: NodeClass
    inputs: dict[str, InputInfo]
    outputs: list[str]
    hidden: list[io.Hidden]
    is_output: bool
    tied_to_id: bool
    checks: Callable[..., bool | str] | None
    fingerprint: Callable[..., Any] | None


def describe(cls: NodeClass) -> NodeInfo:
    """Reads a class's schema, anew for each run because lists of files may differ."""
    schema = cls.GET_SCHEMA()
    inputs = {}
    for entry in schema.inputs or []:
        options = entry.as_dict()
        required = not options.pop("optional", False)
        inputs[entry.id] = InputInfo(entry.get_io_type(), required, options)
    hidden = list(schema.hidden or [])
    return NodeInfo(
        cls=cls,
        inputs=inputs,
        outputs=[output.io_type for output in schema.outputs or []],
        hidden=hidden,
        is_output=schema.is_output_node,
        tied_to_id=schema.not_idempotent or io.Hidden.unique_id in hidden,
        checks=_override(cls, "validate_inputs"),
        fingerprint=_override(cls, "fingerprint_inputs"),
    )


def _override(cls: NodeClass, name: str) -> Callable[..., Any] | None:
    """Class method that the node itself defines; ComfyUI's base class has placeholders of the same name."""
    method = getattr(cls, name, None)
    placeholder = getattr(io.ComfyNode, name, None)
    if method is None or getattr(method, "__func__", method) is getattr(placeholder, "__func__", placeholder):
        return None
    return method


def parameters_of(function: Callable[..., Any]) -> tuple[set[str], bool]:
    """Names of a function's parameters, and whether it takes any other keyword as well."""
    parameters = inspect.signature(function).parameters.values()
    any_name = any(entry.kind is entry.VAR_KEYWORD for entry in parameters)
    return {entry.name for entry in parameters if entry.kind is not entry.VAR_KEYWORD}, any_name


def available_nodes() -> dict[str, NodeClass]:
    """Returns our nodes, through the extension that ComfyUI loads too, and ComfyUI's own that graphs need."""
    from ..nodes.extension import CascadeExtension
    from .builtin import BUILTIN_NODES

    return by_id([*finish(CascadeExtension().get_node_list()), *BUILTIN_NODES])


def by_id(classes: list[NodeClass]) -> dict[str, NodeClass]:
    """Maps node classes by their ids, which must differ."""
    nodes: dict[str, NodeClass] = {}
    for cls in classes:
        node_id = cls.GET_SCHEMA().node_id
        if node_id in nodes:
            pair = f"{cls.__name__} and {nodes[node_id].__name__}"
            raise RuntimeError(f"{pair} have the same node id {node_id!r}.")
        nodes[node_id] = cls
    return nodes


def finish(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Runs a coroutine, also where an event loop is already running (a notebook)."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()
