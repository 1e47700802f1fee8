"""Execution of a validated graph, node by node, with outputs cached by inputs."""

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

from ..cascade_core.errors import CascadeError, Interrupted, excerpt
from ..nodes.api import io
from ..nodes.hosts.reporting import reporting_to
from .folders import current_folders
from .graph import execution_order, is_link, linked_inputs, name_of
from .registry import NodeClass, NodeInfo
from .results import Observer, Result, SavedPicture
from .running import running
from .validation import Validation, sources_of


class NodeError(CascadeError):
    """Failure of a node; the message names it."""


@dataclass
class _CachedOutput:
    """Cached output of a node. `values` is None once no node needs it any more."""

    values: tuple[Any, ...] | None
    ui: dict[str, Any] | None


class _LockedNodeClass(ABCMeta):
    """Metaclass that forbids setting attributes: node classes are stateless, as in ComfyUI."""

    def __setattr__(cls, name: str, value: Any) -> None:
        if name not in ("__abstractmethods__", "_abc_impl"):  # set by ABCMeta itself
            raise AttributeError(f"Cannot modify class attribute '{name}' on locked class '{cls.__name__}'.")
        super().__setattr__(name, value)


class Executor:
    """Runs graphs. With `keep`, a run reuses outputs of nodes with the same inputs in the previous run.

    Without it each node's outputs are released as soon as the last node that takes them has run, so that one
    model leaves the memory before the next is loaded. Within a run no node runs twice on the same inputs.
    """

    def __init__(self, observer: Observer | None = None, keep: bool = True):
        self.observer = observer or Observer()
        self.keep = keep
        self.cache: dict[str, _CachedOutput] = {}

    def run(self, validation: Validation, extra_pnginfo: dict[str, Any] | None = None) -> Result:
        """Executes the outputs of a validated graph. Raises CascadeError (NodeError for a node's own)."""
        run = _Run(self, validation, extra_pnginfo)
        try:
            result = run.execute()
            current_keys = set(run.keys.values())
            self.cache = {key: output for key, output in self.cache.items() if key in current_keys}
            return result
        finally:
            if not self.keep:
                self.cache = {}


class _Run:
    """Run of one graph."""

    def __init__(self, executor: Executor, validation: Validation, extra_pnginfo: dict[str, Any] | None):
        self.observer = executor.observer
        self.releasing = not executor.keep
        self.cache = executor.cache
        self.graph = validation.graph
        self.validation = validation
        self.extra_pnginfo = extra_pnginfo
        self.sources = sources_of(validation)
        self.order = execution_order(self.sources, validation.outputs)
        self.keys: dict[str, str] = {}
        self.fingerprints: dict[str, Any] = {}  # by class and inputs, so that a file is read once
        self.uses: Counter[str] = Counter()
        self.result = Result(node_errors=validation.node_errors)

    def execute(self) -> Result:
        started = time.perf_counter()
        for node_id in self.order:
            self.keys[node_id] = self._key(node_id)
        needed = self._needed()
        for index, node_id in enumerate(needed, 1):
            name = name_of(self.graph, node_id)
            if self.keys[node_id] in self.cache:
                self.observer.node_reused(index, len(needed), name)
            else:
                self.observer.node_started(index, len(needed), name)
                begun = time.perf_counter()
                self.cache[self.keys[node_id]] = self._execute_node(node_id)
                self.result.timings[node_id] = time.perf_counter() - begun
                self.observer.node_finished(self.result.timings[node_id])
                self._release(node_id)
            self._record_output(node_id, time.perf_counter() - started)
        self.result.seconds = time.perf_counter() - started
        return self.result

    def _info(self, node_id: str) -> NodeInfo:
        return self.validation.nodes[self.graph[node_id]["class_type"]]

    def _key(self, node_id: str) -> str:
        """Cache key of a node's outputs: its class, fingerprint and inputs, and those upstream."""
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
        inputs = self._known_inputs(node_id)
        constants = {name: None if is_link(value) else value for name, value in inputs.items()}
        key = json.dumps([self.graph[node_id]["class_type"], constants], sort_keys=True)
        if key not in self.fingerprints:
            self.fingerprints[key] = self._guard(node_id, info.fingerprint, constants)
        value = self.fingerprints[key]
        if isinstance(value, float) and value != value:  # NaN, which means "always run" to the host
            value = uuid.uuid4()
        return repr(value)

    def _known_inputs(self, node_id: str) -> dict[str, Any]:
        declared = self._info(node_id).inputs
        return {name: value for name, value in self.graph[node_id]["inputs"].items() if name in declared}

    def _needed(self) -> list[str]:
        """Nodes to visit: the outputs, and the nodes upstream of them that are not cached by an earlier run."""
        needed = set(self.validation.outputs)
        computed: set[str] = set()
        for node_id in reversed(self.order):
            if node_id in needed and self.keys[node_id] not in self.cache:
                needed.update(self.sources[node_id])
        order = [node_id for node_id in self.order if node_id in needed]
        for node_id in order:  # of nodes with equal keys, the first is executed
            key = self.keys[node_id]
            if key not in self.cache and key not in computed:
                computed.add(key)
                self.uses.update(self.keys[source] for source in self.sources[node_id])
        return order

    def _execute_node(self, node_id: str) -> _CachedOutput:
        info = self._info(node_id)
        inputs = self._known_inputs(node_id)
        for name, source, slot in linked_inputs(self.graph[node_id], inputs):
            values = self.cache[self.keys[source]].values
            assert values is not None
            inputs[name] = values[slot]
        cls = self._bind(info, node_id)
        with torch.inference_mode(), reporting_to(_ObserverSink(self.observer)), running(node_id):
            output = self._guard(node_id, cls.execute, inputs)
        values, ui = _unpack(output)
        if len(values) < len(info.outputs):
            counts = f"gave {len(values)} outputs, but its schema has {len(info.outputs)}"
            raise NodeError(f"Node {name_of(self.graph, node_id)} {counts}; this is a fault of the node.")
        return _CachedOutput(values, ui)

    def _bind(self, info: NodeInfo, node_id: str) -> NodeClass:
        """Returns the node class with its hidden values, locked."""
        values = {
            io.Hidden.unique_id: node_id,
            io.Hidden.prompt: self.graph,
            io.Hidden.extra_pnginfo: self.extra_pnginfo,
        }
        hidden = io.HiddenHolder.from_dict({name: values[name] for name in info.hidden if name in values})
        bound: Any = _LockedNodeClass(info.cls.__name__, (info.cls,), {"hidden": hidden})
        return bound

    def _guard(self, node_id: str, function: Any, inputs: dict[str, Any]) -> Any:
        """Calls into a node and turns any error into one sentence that names it."""
        name = name_of(self.graph, node_id)
        try:
            return function(**inputs)
        except Interrupted:
            raise
        except CascadeError as error:
            raise NodeError(f"Node {name}: {_one_line(error)}") from error
        except OSError as error:
            failure = excerpt(f"{error.filename}: {error.strerror}" if error.filename else str(error))
            advice = "check that it exists and that you may use it"
            raise NodeError(f"Node {name} cannot use {failure}; {advice}.") from error
        except Exception as error:
            if _out_of_memory(error):
                advice = "try a smaller size or batch, or a smaller dtype"
                raise NodeError(f"Node {name} ran out of memory; {advice}.") from error
            failure = f"{type(error).__name__}: {_one_line(error)}"
            raise NodeError(f"Node {name} failed with {failure} (--traceback shows where).") from error

    def _release(self, node_id: str) -> None:
        """Releases the values that no later node takes."""
        if not self.releasing:
            return
        keys = [self.keys[source] for source in self.sources[node_id]]
        self.uses.subtract(keys)
        for key in [*keys, self.keys[node_id]]:
            if self.uses[key] <= 0:
                self.cache[key].values = None

    def _record_output(self, node_id: str, seconds: float) -> None:
        ui = self.cache[self.keys[node_id]].ui
        if node_id not in self.validation.outputs or ui is None:
            return
        self.result.outputs[node_id] = ui
        for entry in ui.get("images", ()):
            path = current_folders().of_kind(entry["type"]) / entry["subfolder"] / entry["filename"]
            picture = SavedPicture(path, node_id, seconds)
            self.result.pictures.append(picture)
            self.observer.picture_saved(picture)


class _ObserverSink:
    """Sink that passes a node's reports on to the observer of the run."""

    def __init__(self, observer: Observer):
        self.observer = observer

    def step(self, step: int, total: int, preview: Any) -> None:
        self.observer.node_step(step, total, preview)

    def notify(self, text: str) -> None:
        self.observer.node_notified(text)

    def interrupted(self) -> bool:
        return self.observer.interrupted()


def _out_of_memory(error: Exception) -> bool:
    """Whether this is Python, the device or torch's allocator (a plain RuntimeError) out of memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _one_line(error: Exception) -> str:
    """Joins the lines of an error's text, cut and escaped, since it may contain text from a file."""
    return excerpt(" ".join(line.strip() for line in str(error).splitlines()))


def _unpack(output: Any) -> tuple[tuple[Any, ...], dict[str, Any] | None]:
    """Values and ui dictionary of a node's return value: a NodeOutput, a tuple or None."""
    if output is None:
        return (), None
    if isinstance(output, tuple):
        return output, None
    ui = output.ui
    return tuple(output.result or ()), ui.as_dict() if hasattr(ui, "as_dict") else ui
