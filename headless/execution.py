"""Execution of a validated graph, node by node, with outputs kept by inputs."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from abc import ABCMeta
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from ..cascade_core.errors import CascadeError, Interrupted
from ..nodes.api import io
from ..nodes.hosts.reporting import reporting_to
from .folders import current_folders
from .graph import execution_order, is_link, linked_inputs, name_of
from .registry import NodeClass, NodeInfo
from .results import Observer, Picture, Result
from .validation import Validation, sources_of


class NodeError(CascadeError):
    """A node could not do its work; the message names it."""


@dataclass
class _Kept:
    """What a node gave. `values` is None once no node needs them any more."""

    values: tuple[Any, ...] | None
    ui: dict[str, Any] | None


class _Locked(ABCMeta):
    """Node classes hold no state, here as in ComfyUI: setting an attribute on one is an error."""

    def __setattr__(cls, name: str, value: Any) -> None:
        if name not in ("__abstractmethods__", "_abc_impl"):  # ABCMeta's own
            raise AttributeError(f"Cannot modify class attribute '{name}' on locked class '{cls.__name__}'.")
        super().__setattr__(name, value)


class Executor:
    """Runs graphs. With `keep`, a later run reuses what nodes of the last one gave for the same inputs.

    Without it each node's outputs are let go as soon as the last node that takes them has run, so that one
    model leaves the memory before the next is loaded. Within a run no node runs twice on the same inputs.
    """

    def __init__(self, observer: Observer | None = None, keep: bool = True):
        self.observer = observer or Observer()
        self.keep = keep
        self.kept: dict[str, _Kept] = {}

    def run(self, validation: Validation, extra_pnginfo: dict[str, Any] | None = None) -> Result:
        """Execute the outputs of a validated graph. Raises CascadeError (NodeError for a node's own)."""
        run = _Run(self, validation, extra_pnginfo)
        try:
            result = run.execute()
            wanted = set(run.keys.values())
            self.kept = {key: kept for key, kept in self.kept.items() if key in wanted}
            return result
        finally:
            if not self.keep:
                self.kept = {}


class _Run:
    """One run of one graph."""

    def __init__(self, executor: Executor, validation: Validation, extra_pnginfo: dict[str, Any] | None):
        self.observer = executor.observer
        self.release = not executor.keep
        self.kept = executor.kept
        self.graph = validation.graph
        self.validation = validation
        self.extra_pnginfo = extra_pnginfo
        self.sources = sources_of(validation)
        self.order = execution_order(self.sources, validation.outputs)
        self.keys: dict[str, str] = {}
        self.uses: Counter[str] = Counter()
        self.result = Result(node_errors=validation.node_errors)

    def execute(self) -> Result:
        started = time.perf_counter()
        for node_id in self.order:
            self.keys[node_id] = self._key(node_id)
        needed = self._needed()
        for index, node_id in enumerate(needed, 1):
            name = name_of(self.graph, node_id)
            if self.keys[node_id] in self.kept:
                self.observer.node_reused(index, len(needed), name)
            else:
                self.observer.node_started(index, len(needed), name)
                begun = time.perf_counter()
                self.kept[self.keys[node_id]] = self._execute_node(node_id)
                self.result.timings[node_id] = time.perf_counter() - begun
                self.observer.node_finished(self.result.timings[node_id])
                self._let_go(node_id)
            self._note_output(node_id, time.perf_counter() - started)
        self.result.seconds = time.perf_counter() - started
        return self.result

    def _info(self, node_id: str) -> NodeInfo:
        return self.validation.nodes[self.graph[node_id]["class_type"]]

    def _key(self, node_id: str) -> str:
        """Names what a node will give: its class, fingerprint and inputs, and so on upstream."""
        node, info = self.graph[node_id], self._info(node_id)
        signature: list[Any] = [node["class_type"], self._fingerprint(node_id)]
        if info.tied_to_id:
            signature.append(node_id)
        for name in sorted(info.inputs.keys() & node["inputs"].keys()):
            value = node["inputs"][name]
            link = is_link(value)
            signature.append([name, link, [self.keys[value[0]], value[1]] if link else value])
        return hashlib.sha256(json.dumps(signature, sort_keys=True).encode()).hexdigest()

    def _fingerprint(self, node_id: str) -> str:
        info = self._info(node_id)
        if info.fingerprint is None:
            return ""
        given = self._given(node_id)
        constants = {name: None if is_link(value) else value for name, value in given.items()}
        value = self._guard(node_id, info.fingerprint, constants)
        if isinstance(value, float) and value != value:  # NaN, the host's word for "always run"
            value = uuid.uuid4()
        return repr(value)

    def _given(self, node_id: str) -> dict[str, Any]:
        known = self._info(node_id).inputs
        return {name: value for name, value in self.graph[node_id]["inputs"].items() if name in known}

    def _needed(self) -> list[str]:
        """The nodes to visit: the outputs, and upstream of them what is not kept from an earlier run."""
        needed = set(self.validation.outputs)
        computed: set[str] = set()
        for node_id in reversed(self.order):
            if node_id in needed and self.keys[node_id] not in self.kept:
                needed.update(self.sources[node_id])
        order = [node_id for node_id in self.order if node_id in needed]
        for node_id in order:  # of nodes with one key the first is executed
            key = self.keys[node_id]
            if key not in self.kept and key not in computed:
                computed.add(key)
                self.uses.update(self.keys[source] for source in self.sources[node_id])
        return order

    def _execute_node(self, node_id: str) -> _Kept:
        info = self._info(node_id)
        inputs = self._given(node_id)
        for name, source, slot in linked_inputs(self.graph[node_id], inputs):
            values = self.kept[self.keys[source]].values
            assert values is not None
            inputs[name] = values[slot]
        cls = self._bind(info, node_id)
        with torch.inference_mode(), reporting_to(_Steps(self.observer)):
            output = self._guard(node_id, cls.execute, inputs)
        values, ui = _unpack(output)
        if len(values) < len(info.outputs):
            counts = f"gave {len(values)} outputs, but its schema has {len(info.outputs)}"
            raise NodeError(f"Node {name_of(self.graph, node_id)} {counts}; this is a fault of the node.")
        return _Kept(values, ui)

    def _bind(self, info: NodeInfo, node_id: str) -> NodeClass:
        """The node class with its hidden values, locked."""
        have = {
            io.Hidden.unique_id: node_id,
            io.Hidden.prompt: self.graph,
            io.Hidden.extra_pnginfo: self.extra_pnginfo,
        }
        hidden = io.HiddenHolder.from_dict({name: have[name] for name in info.hidden if name in have})
        bound: Any = _Locked(info.cls.__name__, (info.cls,), {"hidden": hidden})
        return bound

    def _guard(self, node_id: str, function: Any, inputs: dict[str, Any]) -> Any:
        """Call into a node; whatever goes wrong there becomes one sentence that names it."""
        name = name_of(self.graph, node_id)
        try:
            return function(**inputs)
        except Interrupted:
            raise
        except CascadeError as error:
            raise NodeError(f"Node {name}: {_one_line(error)}") from error
        except OSError as error:
            what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            advice = "check that it exists and that you may use it"
            raise NodeError(f"Node {name} cannot use {what}; {advice}.") from error
        except Exception as error:
            if _out_of_memory(error):
                advice = "try a smaller size or batch, or a smaller dtype"
                raise NodeError(f"Node {name} ran out of memory; {advice}.") from error
            what = f"{type(error).__name__}: {_one_line(error)}"
            raise NodeError(f"Node {name} failed with {what} (--traceback shows where).") from error

    def _let_go(self, node_id: str) -> None:
        """Forget the values that no node still to be executed takes."""
        if not self.release:
            return
        keys = [self.keys[source] for source in self.sources[node_id]]
        self.uses.subtract(keys)
        for key in [*keys, self.keys[node_id]]:
            if self.uses[key] <= 0:
                self.kept[key].values = None

    def _note_output(self, node_id: str, seconds: float) -> None:
        ui = self.kept[self.keys[node_id]].ui
        if node_id not in self.validation.outputs or ui is None:
            return
        self.result.outputs[node_id] = ui
        for entry in ui.get("images", ()):
            path = current_folders().of_kind(entry["type"]) / entry["subfolder"] / entry["filename"]
            picture = Picture(path, node_id, seconds)
            self.result.pictures.append(picture)
            self.observer.picture_saved(picture)


class _Steps:
    """Passes a node's reports on to the observer of the run."""

    def __init__(self, observer: Observer):
        self.observer = observer

    def step(self, step: int, total: int, preview: Any) -> None:
        self.observer.node_step(step, total, preview)

    def tell(self, text: str) -> None:
        self.observer.node_told(text)

    def interrupted(self) -> bool:
        return self.observer.interrupted()


def _out_of_memory(error: Exception) -> bool:
    """Whether this is Python, the device or torch's allocator (a plain RuntimeError) out of memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _one_line(error: Exception) -> str:
    """An error's text, whose lines a library may have broken."""
    return " ".join(line.strip() for line in str(error).splitlines())


def _unpack(output: Any) -> tuple[tuple[Any, ...], dict[str, Any] | None]:
    """The values and the ui dictionary of whatever a node may return: a NodeOutput, a tuple or nothing."""
    if output is None:
        return (), None
    if isinstance(output, tuple):
        return output, None
    ui = output.ui
    return tuple(output.result or ()), ui.as_dict() if hasattr(ui, "as_dict") else ui
