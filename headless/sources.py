"""Sources of graphs: API format, a body of POST /prompt, a workflow of the canvas, or a picture with one of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cascade_core.errors import CascadeError, printable
from ..cascade_core.reading import open_regular
from .assignments import assign
from .canvas import InputsOf, is_workflow, to_graph
from .embedded import embedded_texts, is_picture
from .graph import Graph, check_json, check_shape, parse_json, read_bytes
from .patterns import fill_in_prefixes
from .results import Observer
from .seeds import draw_seeds
from .summary import FILE_SUFFIXES


@dataclass(frozen=True)
class Source:
    """A graph, and the workflow of the canvas that it comes from, if known."""

    graph: Graph
    workflow: dict[str, Any] | None = None

    @property
    def extra_pnginfo(self) -> dict[str, Any] | None:
        """The data that pictures hold beside the graph, as in ComfyUI."""
        return None if self.workflow is None else {"workflow": self.workflow}


def read_source(path: Path, inputs_of: InputsOf) -> Source:
    """Reads a graph in whatever form a file has it.

    From a picture with both, the executed graph is taken, not the workflow, which may have been changed since. Raises
    CascadeError where the file is missing, too large, or holds no graph.
    """
    name = printable(str(path))
    if path.suffix.lower() in FILE_SUFFIXES:
        raise CascadeError(
            f"{name} has the name of a file of weights, which holds no graph; give a graph or a picture, "
            "or see `cascade show`."
        )
    if starts_as_picture(path):
        return _of_picture(path, name, inputs_of)
    return source_of(parse_json(read_bytes(path), name), name, inputs_of)


def source_of(value: Any, name: str, inputs_of: InputsOf) -> Source:
    """A graph in API format, a body of POST /prompt or a workflow, as JSON has it."""
    workflow = None
    if isinstance(value, dict) and isinstance(value.get("prompt"), dict) and "inputs" not in value["prompt"]:
        workflow = _workflow_of_body(value)
        value, name = value["prompt"], f"{name} (its prompt)"
    elif is_workflow(value):
        check_json(value, name)
        workflow, value = value, to_graph(value, name, inputs_of)
    check_shape(value, name)
    return Source(value, workflow)


def _workflow_of_body(body: dict[str, Any]) -> dict[str, Any] | None:
    inner: Any = body
    for key in ("extra_data", "extra_pnginfo", "workflow"):
        inner = inner.get(key) if isinstance(inner, dict) else None
    if not is_workflow(inner):
        return None
    check_json(inner, "The workflow")
    return inner


def starts_as_picture(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            return is_picture(file.read(12))
    except (OSError, ValueError):
        return False  # reading it as a graph will report the fault


def _of_picture(path: Path, name: str, inputs_of: InputsOf) -> Source:
    texts, _ = embedded_texts(path)
    values: dict[str, Any] = {}
    for key in ("prompt", "workflow"):
        try:
            values[key] = parse_json(texts.get(key, ""), name)
        except CascadeError:  # text of another program in a chunk of that name
            values[key] = None
    workflow = values["workflow"] if is_workflow(values["workflow"]) else None
    if workflow is not None:
        check_json(workflow, f"{name} (its workflow)")
    if isinstance(values["prompt"], dict):
        check_shape(values["prompt"], f"{name} (its prompt)")
        return Source(values["prompt"], workflow)
    if workflow is None:
        raise CascadeError(
            f"{name} holds no graph; choose a picture that ComfyUI or cascade saved and no other "
            "program has saved since."
        )
    return source_of(workflow, f"{name} (its workflow)", inputs_of)


def prepared(source: Source, assignments: Iterable[str], inputs_of: InputsOf, observer: Observer) -> Source:
    """The graph ready to be validated or sent: with values of --set, drawn seeds and filled-in prefixes.

    The workflow is kept only while its values are unchanged, because ComfyUI opens it in place of the graph.
    """

    def input_types(class_type: str) -> dict[str, str] | None:
        inputs = inputs_of(class_type)
        return None if inputs is None else {name: entry.type for name, entry in inputs.items()}

    assignments = list(assignments)
    graph, seed = draw_seeds(assign(source.graph, assignments, input_types))
    if seed is not None:
        observer.seed_drawn(seed)
    changed = assignments or seed is not None
    return Source(fill_in_prefixes(graph), None if changed else source.workflow)
