"""Summary of a graph: prompt, seeds, steps and files, found by the names of inputs.

So it also reads graphs with other nodes, as far as their inputs are named as in ComfyUI.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from .graph import Graph, is_link
from .seeds import SEED_INPUTS

FILE_SUFFIXES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".onnx")
_SETTINGS = {  # settings of a sampler, by ComfyUI's names and ours
    "steps": "steps",
    "cfg": "cfg",
    "cfg_rescale": "cfg_rescale",
    "shift": "shift",
    "sampler": "sampler",
    "sampler_name": "sampler",
    "scheduler": "scheduler",
    "denoise": "denoise",
}
_STAGES = {"CascadePriorSampler": "Stage C", "CascadeDecoderSampler": "Stage B"}
_TEXTS = ("conditioning", "conditioning_1", "text", "text_g", "value", "string")  # what leads on to a prompt
_STRENGTHS = ("strength_model", "strength_clip")


@dataclass(frozen=True)
class Sampling:
    """A sampler of a graph: its stage, where that is known, and settings such as seed, steps and cfg."""

    node: str
    class_type: str
    stage: str | None
    settings: dict[str, Any]


@dataclass(frozen=True)
class File:
    """A file that a graph loads; strengths: those that the node states."""

    node: str
    class_type: str
    name: str
    strengths: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """Prompt, samplers, files and pictures behind a saved picture.

    positive, negative  texts of the prompt; None where they are not found
    samplers            those that the picture passes through, the last one first
    files               of models, as far as the graph names them
    pictures            that the graph starts from
    model               the file that the first stage samples with
    """

    positive: str | None = None
    negative: str | None = None
    samplers: list[Sampling] = field(default_factory=list)
    files: list[File] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    model: str | None = None

    @property
    def first(self) -> Sampling | None:
        """The sampler that decides the picture's content: Stage C's, else the last one."""
        stage_c = (sampling for sampling in self.samplers if sampling.stage == "Stage C")
        return next(stage_c, self.samplers[0] if self.samplers else None)


def summarise(graph: Graph, node_id: str | None = None) -> Summary:
    """Summary of one node's picture; by default of all nodes whose outputs no other node takes."""
    upstream = _upstream(graph, [node_id] if node_id is not None else _ends(graph))
    summary = Summary(
        samplers=_samplers(graph, upstream),
        files=[file for node in upstream for file in _files(graph, node)],
        pictures=[
            name
            for node in upstream
            if isinstance(name := graph[node]["inputs"].get("image"), str)
            and str(graph[node].get("class_type")).startswith("Load")
        ],
    )
    first = summary.first
    guiding = [node for node in upstream if "positive" in graph[node]["inputs"]]
    main = first.node if first is not None and first.node in guiding else next(iter(guiding), None)
    if main is None:
        return summary
    return Summary(
        _text(graph, graph[main]["inputs"], "positive"),
        _text(graph, graph[main]["inputs"], "negative"),
        summary.samplers,
        summary.files,
        summary.pictures,
        _model(graph, main),
    )


def parameters(summary: Summary, width: int, height: int, batch: int = 1, index: int = 0) -> str | None:
    """The text chunk `parameters` that viewers show, in the form that AUTOMATIC1111's web UI began.

    batch, index: number of pictures made at once, and this one's index. None without a prompt or a seed.
    """
    first = summary.first
    if first is None or summary.positive is None or "seed" not in first.settings:
        return None
    settings = first.settings
    second = next((one.settings for one in summary.samplers if one.stage == "Stage B"), {})
    loras = [f"{_stem(file.name)} {file.strengths['strength_model']:g}" for file in _loras(summary)]
    entries = {
        "Steps": settings.get("steps"),
        "Sampler": settings.get("sampler"),
        "Schedule type": settings.get("scheduler"),
        "CFG scale": settings.get("cfg"),
        "Seed": settings["seed"],
        "Size": f"{width}x{height}",
        "Model": _stem(summary.model) if summary.model else None,
        "Denoising strength": settings.get("denoise") if settings.get("denoise") != 1 else None,
        "LoRAs": ", ".join(loras) or None,
        "Stage B seed": second.get("seed"),
        "Stage B steps": second.get("steps"),
        "Stage B CFG scale": second.get("cfg"),
        "Batch size": batch if batch > 1 else None,
        "Batch pos": index if batch > 1 else None,
    }
    line = ", ".join(f"{name}: {_entry(value)}" for name, value in entries.items() if value is not None)
    negative = [f"Negative prompt: {summary.negative}"] if summary.negative else []
    text = "\n".join([summary.positive, *negative, line])
    # A text chunk can hold neither NUL nor lone surrogates.
    return text.replace("\x00", "").encode("utf-8", "replace").decode()


def _loras(summary: Summary) -> list[File]:
    return [file for file in summary.files if "strength_model" in file.strengths]


def _stem(name: str) -> str:
    path = PurePosixPath(name.replace("\\", "/"))
    return path.stem if path.suffix in FILE_SUFFIXES else path.name


def _entry(value: Any) -> str:
    """A value for the line of settings, quoted where its characters would break the line."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(",:\n") else text


def _ends(graph: Graph) -> list[str]:
    taken = {source for node in graph for _, source, _ in _links(graph, node)}
    return [node for node in graph if node not in taken]


def _links(graph: Graph, node: str) -> Iterator[tuple[str, str, int]]:
    """(input, source node, output) of each connection to an existing node."""
    for name, value in graph[node]["inputs"].items():
        if is_link(value) and value[0] in graph:
            yield name, value[0], value[1]


def _upstream(graph: Graph, ends: list[str]) -> dict[str, bool]:
    """The upstream nodes, nearest first, each with whether it is reached through Stage C's latent."""
    found = dict.fromkeys(ends, False)
    pending = list(ends)
    for node in pending:  # grows during the loop
        for name, source, _ in _links(graph, node):
            if source not in found:
                found[source] = found[node] or name == "stage_c"
                pending.append(source)
    return found


def _samplers(graph: Graph, upstream: dict[str, bool]) -> list[Sampling]:
    semantic = any(upstream.values())
    samplers = []
    for node, is_semantic in upstream.items():
        inputs, class_type = graph[node]["inputs"], str(graph[node].get("class_type"))
        seeds = [_literal(graph, inputs[name]) for name in SEED_INPUTS if name in inputs]
        if not seeds or type(seeds[0]) is not int:
            continue
        settings: dict[str, int | float | str] = {"seed": seeds[0]}
        for name, setting in _SETTINGS.items():
            value = _literal(graph, inputs.get(name))
            if isinstance(value, int | float | str):
                settings[setting] = value
        guess = ("Stage C" if is_semantic else "Stage B") if semantic and "model" in inputs else None
        samplers.append(Sampling(node, class_type, _STAGES.get(class_type, guess), settings))
    return samplers


def _literal(graph: Graph, value: Any) -> Any:
    """An input's value, directly or from a connected node that only holds a value."""
    if is_link(value):
        source = graph.get(value[0])
        value = source["inputs"].get("value") if source is not None else None
    return value


def _files(graph: Graph, node: str) -> Iterator[File]:
    inputs, class_type = graph[node]["inputs"], str(graph[node].get("class_type"))
    strengths = {
        name: float(inputs[name])
        for name in _STRENGTHS
        if isinstance(inputs.get(name), int | float) and abs(inputs[name]) < 1e9
    }
    for name, value in inputs.items():
        if isinstance(value, str) and (name == "file" or value.lower().endswith(FILE_SUFFIXES)):
            yield File(node, class_type, value, strengths)


def _text(graph: Graph, inputs: dict[str, Any], side: str) -> str | None:
    """The prompt behind a connection, found through nodes that pass on both prompts or a conditioning."""
    value: Any = inputs.get(side)
    seen: set[str] = set()
    while is_link(value) and value[0] in graph and value[0] not in seen:
        node, slot = value
        seen.add(node)
        inputs = graph[node]["inputs"]
        if "positive" in inputs and "negative" in inputs:
            value = inputs["positive" if slot == 0 else "negative"]
        else:
            value = next((inputs[name] for name in _TEXTS if name in inputs), None)
    return value if isinstance(value, str) else None


def _model(graph: Graph, node: str) -> str | None:
    """The file of the MODEL that a sampler takes."""
    value: Any = graph[node]["inputs"].get("model")
    seen: set[str] = set()
    while is_link(value) and value[0] in graph and value[0] not in seen:
        seen.add(value[0])
        inputs = graph[value[0]]["inputs"]
        if not is_link(inputs.get("model")):
            return next((file.name for file in _files(graph, value[0])), None)
        value = inputs["model"]
    return None
