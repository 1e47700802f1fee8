"""Run of a graph from start to end: read, assign, validate, execute."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..nodes.hosts.headless.device import computing_with
from .execution import Executor
from .folders import Folders, using_folders
from .graph import Graph
from .registry import InputInfo, NodeClass, available_nodes, describe
from .results import Result
from .sentences import GraphError
from .sources import prepared, read_source, source_of
from .validation import validate


def run_graph(
    graph: Graph | Path | str,
    *,
    assignments: Iterable[str] = (),
    input_folder: Path | str = "input",
    output_folder: Path | str = "output",
    graph_folder: Path | str | None = None,
    nodes: Mapping[str, NodeClass] | None = None,
    executor: Executor | None = None,
    extra_pnginfo: dict[str, Any] | None = None,
    partial: bool = False,
    memory: str | None = None,
) -> Result:
    """Executes a graph in this process.

    graph        the graph in API format, or a file that holds it: JSON, a picture that it made, a body of POST
                 /prompt, or a workflow of the canvas whose nodes are all known
    assignments  `NODE.INPUT=VALUE` texts, as with `cascade run --set`
    nodes        {node id: class}; by default all of ours, and those of ComfyUI's own that `cascade nodes` lists
    graph_folder where LoadImage looks too, by default the folder of the graph's file
    executor     caches outputs from run to run when given, so that nodes with the same inputs do not run again
    partial      run the valid outputs when others are not (`Result.node_errors` has those), as ComfyUI does
    memory       limit of the GPU's memory, such as "6GB"; by default $CASCADE_MEMORY, else what is free

    Raises CascadeError: GraphError for an invalid graph, NodeError for a node that failed.
    """
    classes = available_nodes() if nodes is None else nodes

    def inputs_of(class_type: str) -> Mapping[str, InputInfo] | None:
        return describe(classes[class_type]).inputs if class_type in classes else None

    if isinstance(graph, str | Path):
        folder, source = Path(graph).parent, read_source(Path(graph), inputs_of)
    else:
        folder, source = Path(), source_of(graph, "The graph", inputs_of)
    executor = executor or Executor(keep=False)
    if graph_folder is not None:
        folder = Path(graph_folder)
    folders = Folders(Path(input_folder), Path(output_folder), folder)
    with using_folders(folders), computing_with(memory) if memory else nullcontext():
        ready = prepared(source, assignments, inputs_of, executor.observer)
        validation = validate(ready.graph, classes)
        if validation.error is not None or (validation.node_errors and not partial):
            raise GraphError(validation.error, validation.node_errors, classes)
        return executor.run(validation, extra_pnginfo or ready.extra_pnginfo)
