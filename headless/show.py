"""`cascade show FILE`: describes how a picture was made, or a graph, a LoRA or a network."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cascade_core.errors import CascadeError, escaped, printable
from .embedded import embedded_texts
from .graph import to_json
from .sources import Source, read_source, starts_as_picture
from .summary import FILE_SUFFIXES, Summary, summarise

if TYPE_CHECKING:
    from .registry import InputInfo

_WIDTH = 9  # of the names that begin lines

# Facts about a file for programs, and lines for people.
Description = tuple[dict[str, Any], list[str]]


def show(path: Path, as_json: bool = False) -> str:
    """Text or JSON about a file. Raises CascadeError for a file without any information."""
    facts, lines = _describe(path)
    if as_json:
        return to_json({"file": path.name, **facts}, indent=2)
    return "\n".join(escaped(line) for line in lines)


def _describe(path: Path) -> Description:
    weights = path.suffix.lower() in FILE_SUFFIXES or ".safetensors." in path.name  # of an index of shards
    if os.path.isdir(path) or weights:
        return _describe_networks(path) or _describe_lora(path)
    return _describe_graph(path)


def _describe_graph(path: Path) -> Description:
    texts: dict[str, str] = {}
    facts: dict[str, Any] = {}
    title = printable(path.name)
    if starts_as_picture(path):
        texts, (width, height) = embedded_texts(path)
        facts |= {"width": width, "height": height, "parameters": texts.get("parameters")}
        title += f": {width} × {height}"
    try:
        source = read_source(path, _known_inputs)
    except CascadeError:
        if "parameters" not in texts:
            raise
        source = None  # another program's picture, with a text about how it was made
    if source is None:
        return facts, [title, *texts["parameters"].splitlines()]
    summary = summarise(source.graph)
    facts |= {**_facts(summary), "graph": source.graph}
    return facts, [title, *_lines(summary, source)]


def _known_inputs(class_type: str) -> Mapping[str, InputInfo] | None:
    from .registry import available_nodes, describe  # imports torch; needed only for workflows of the canvas

    nodes = available_nodes()
    return describe(nodes[class_type]).inputs if class_type in nodes else None


def _facts(summary: Summary) -> dict[str, Any]:
    return {
        "prompt": summary.positive,
        "negative": summary.negative,
        "samplers": [
            {"node": one.node, "class_type": one.class_type, "stage": one.stage, **one.settings}
            for one in reversed(summary.samplers)
        ],
        "files": [asdict(file) for file in summary.files],
        "pictures": summary.pictures,
    }


def _lines(summary: Summary, source: Source) -> list[str]:
    lines = _named("prompt", summary.positive) + _named("negative", summary.negative)
    for sampling in reversed(summary.samplers):
        settings = ", ".join(_setting(name, value) for name, value in sampling.settings.items())
        lines += _named(sampling.stage or "sampler", f"{settings}  ({sampling.node} {sampling.class_type})")
    for name in summary.pictures:
        lines += _named("picture", name)
    for file in summary.files:
        strengths = "".join(f", {name} {value:g}" for name, value in file.strengths.items())
        lines += _named("file", f"{file.name}{strengths}  ({file.node} {file.class_type})")
    return lines + _named("graph", f"{len(source.graph)} nodes; --json prints it")


def _setting(name: str, value: Any) -> str:
    if isinstance(value, str):  # the name of a sampler or scheduler
        return value
    number = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{number} steps" if name == "steps" else f"{name} {number}"


def _named(name: str, text: str | None) -> list[str]:
    """A text after its name, with further lines indented below."""
    first, *further = (text or "").splitlines() or [""]
    if not text:
        return []
    return [f"{name:{_WIDTH}} {first}", *(f"{'':{_WIDTH}} {line}" for line in further)]


def _describe_networks(path: Path) -> Description | None:
    """Description of a file or a folder of diffusers; None for a file without a network, and for PEFT's folder."""
    from ..cascade_core.adapters.about import describe_training, training_facts
    from ..cascade_core.adapters.peft import adapter_file
    from ..cascade_core.checkpoints import PART_NAMES, networks_stored, read_header

    stored = networks_stored(path)
    if not stored and os.path.isdir(adapter_file(path)):
        raise CascadeError(
            f"{printable(str(path))} is a folder without networks of Stable Cascade; give a picture, a graph, a LoRA, "
            "a network, or a folder as diffusers or PEFT has them."
        )
    if not stored:
        return None
    networks, lines = [], [printable(path.name or str(path))]
    for part, (layout, tensors) in stored.items():
        weights = sum(tensor.numel() for tensor in tensors.values())
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
        networks.append({"network": part, "layout": layout, "weights": weights, "dtypes": dtypes})
        lines.append(f"{PART_NAMES[part]}: {weights:,} weights in {', '.join(dtypes)} ({layout} names)")
    metadata = read_header(path).metadata if path.suffix.lower() == ".safetensors" else {}
    training = describe_training(path.name, metadata)
    facts = {"kind": "networks", "networks": networks, "training": training_facts(metadata)}
    return facts, [*lines, *([training] if training else [])]


def _describe_lora(path: Path) -> Description:
    from ..cascade_core.adapters import adapter_facts, describe_file, read_adapter
    from ..cascade_core.adapters.about import describe_notes, training_facts

    adapter = read_adapter(path)
    facts = {
        "kind": "lora",
        **adapter_facts(adapter),
        "training": training_facts(adapter.metadata),
        "notes": describe_notes(adapter),
    }
    return facts, describe_file(adapter)
