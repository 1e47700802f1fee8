"""Makes jobs of rows: puts values into the graph, names the pictures, and refuses bad rows before the work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from ...cascade_core.errors import CascadeError
from ..assignments import assign, assign_values
from ..canvas import InputsOf
from ..folders import Folders, using_folders
from ..graph import Graph, name_of
from ..registry import InputInfo
from .journal import Journal
from .rows import NAME, Row
from .work import Job, Waiting, sentence_of

PREFIX = "filename_prefix"


@dataclass
class Plan:
    """Plan of a batch: rows to make, rows that are done already, and (name, sentence) of rows that cannot be done."""

    waiting: list[Waiting] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)

    @property
    def fault_of_all(self) -> str | None:
        """The sentence of every row, where all of several rows have the same fault: a column or the graph is wrong."""
        sentences = {sentence for _, sentence in self.faults}
        alike = len(self.faults) > 1 and len(sentences) == 1 and not (self.waiting or self.done)
        return sentences.pop() if alike else None


def remembering(inputs_of: InputsOf) -> InputsOf:
    """Caches the inputs of each class, since every row of a batch has the same nodes."""
    known: dict[str, Mapping[str, InputInfo] | None] = {}

    def remembered(class_type: str) -> Mapping[str, InputInfo] | None:
        if class_type not in known:
            known[class_type] = inputs_of(class_type)
        return known[class_type]

    return remembered


def make_plan(
    graph: Graph,
    rows: Iterable[Row],
    assignments: Iterable[str],
    inputs_of: InputsOf,
    journal: Journal,
    check: Callable[[Graph], None] | None = None,
) -> Plan:
    """Plans a batch. `check` raises CascadeError for a graph that cannot run, before anything is loaded."""

    def input_types(class_type: str) -> dict[str, str] | None:
        inputs = inputs_of(class_type)
        return None if inputs is None else {name: entry.type for name, entry in inputs.items()}

    given, graph = graph, assign(graph, assignments, input_types)
    savers = tuple(node_id for node_id, node in graph.items() if isinstance(node["inputs"].get(PREFIX), str))
    if not savers:
        raise CascadeError(
            "The graph has no node that saves pictures, such as SaveImage, so a batch keeps none."
        )

    _check_prefixes(given, graph, savers)

    def job_of(row: Row) -> Job:
        changed = assign_values(graph, row.values, input_types)
        _check_prefixes(graph, changed, savers)
        return _job(row, changed, savers)

    plan = Plan()
    for row in rows:
        try:
            if row.fault is not None:
                raise CascadeError(row.fault)
            job = job_of(row)
            if journal.is_done(job):
                plan.done.append(job.name)
                continue
            if check is not None:
                check(job.graph)
        except CascadeError as error:
            plan.faults.append((row.name, sentence_of(error)))
        else:
            plan.waiting.append(Waiting(row.name, partial(job_of, row)))
    return plan


def _check_prefixes(before: Graph, after: Graph, savers: tuple[str, ...]) -> None:
    """Raises CascadeError for a prefix that was set, since it would have no effect."""
    for node_id in savers:
        if after[node_id]["inputs"][PREFIX] != before[node_id]["inputs"].get(PREFIX):
            raise CascadeError(
                f"{PREFIX} of node {name_of(after, node_id)} has no effect in a batch, whose pictures are named by "
                f"the rows; leave it out, and give names in the column {NAME}."
            )


def _job(row: Row, graph: Graph, savers: tuple[str, ...]) -> Job:
    digest = hashlib.sha256(json.dumps(graph, sort_keys=True).encode()).hexdigest()[:16]
    for number, node_id in enumerate(savers, 1):
        graph[node_id]["inputs"][PREFIX] = row.name + (f"_{number}" if len(savers) > 1 else "")
    return Job(row.name, graph, savers, digest)


def checking(folders: Folders) -> Callable[[Graph], None]:
    """Checks graphs as `cascade run` does before it executes one."""
    from ..registry import available_nodes
    from ..sentences import GraphError
    from ..validation import validate

    classes = available_nodes()

    def check(graph: Graph) -> None:
        with using_folders(folders):
            validation = validate(graph, classes)
        if validation.error is not None or validation.node_errors:
            raise GraphError(validation.error, validation.node_errors, classes)

    return check
