"""Run of a graph from start to end: read, assign, validate, execute."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..nodes.hosts.headless.device import computing_with
from .assignments import assign
from .execution import Executor
from .folders import Folders, using_folders
from .graph import Graph, check_shape, read_graph
from .patterns import fill_in_prefixes
from .registry import NodeClass, available_nodes, describe
from .results import Result
from .sentences import GraphError
from .validation import validate


def run_graph(
    graph: Graph | Path | str,
    *,
    assignments: Iterable[str] = (),
    input_folder: Path | str = "input",
    output_folder: Path | str = "output",
    nodes: Mapping[str, NodeClass] | None = None,
    executor: Executor | None = None,
    extra_pnginfo: dict[str, Any] | None = None,
    partial: bool = False,
    memory: str | None = None,
) -> Result:
    """Executes a graph in API format in this process.

    graph        the graph, or a JSON file that holds it
    assignments  `NODE.INPUT=VALUE` texts, as with `cascade run --set`
    nodes        {node id: class}; by default all of ours, LoadImage, LoadImageMask, SaveImage, PreviewImage
    executor     caches outputs from run to run when given, so that nodes with the same inputs do not run again
    partial      run the valid outputs when others are not (`Result.node_errors` has those), as ComfyUI does
    memory       limit of the GPU's memory, such as "6GB"; by default $CASCADE_MEMORY, else what is free

    Raises CascadeError: GraphError for an invalid graph, NodeError for a node that failed.
    """
    folder = Path()
    if isinstance(graph, str | Path):
        folder = Path(graph).parent
        graph = read_graph(Path(graph))
    check_shape(graph, "The graph")
    classes = available_nodes() if nodes is None else nodes

    def input_types(class_type: str) -> dict[str, str] | None:
        if class_type not in classes:
            return None
        return {name: entry.type for name, entry in describe(classes[class_type]).inputs.items()}

    folders = Folders(Path(input_folder), Path(output_folder), folder)
    with using_folders(folders), computing_with(memory) if memory else nullcontext():
        validation = validate(fill_in_prefixes(assign(graph, assignments, input_types)), classes)
        if validation.error is not None or (validation.node_errors and not partial):
            raise GraphError(validation.error, validation.node_errors, classes)
        return (executor or Executor(keep=False)).run(validation, extra_pnginfo)
