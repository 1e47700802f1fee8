"""Subset of ComfyUI's V3 node API (`comfy_api.latest`) that our nodes use, for machines without ComfyUI.

Names, keywords and dictionaries are those of ComfyUI 0.3.64, so that a node which runs here registers there
too: a keyword that 0.3.64 does not know is a TypeError here as well. Features that the embedded host cannot execute
(list inputs and outputs, lazy inputs, node expansion, execution blockers) are left out on purpose.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from .socket_types import (
    Boolean,
    Clip,
    ClipVision,
    ClipVisionOutput,
    Combo,
    Conditioning,
    ControlNet,
    Custom,
    Float,
    FolderType,
    Image,
    Input,
    Int,
    Latent,
    Mask,
    Model,
    NumberDisplay,
    Output,
    Sampler,
    Sigmas,
    String,
    UploadType,
    Vae,
    WidgetInput,
)


class Hidden(StrEnum):
    """Values that a node gets from its host without a socket, as `cls.hidden.<name>` inside `execute`."""

    unique_id = "UNIQUE_ID"
    prompt = "PROMPT"
    extra_pnginfo = "EXTRA_PNGINFO"


@dataclass(frozen=True)
class HiddenHolder:
    """Hidden values of one execution; None for those that are not requested or not available."""

    unique_id: str | None = None
    prompt: dict[str, Any] | None = None
    extra_pnginfo: dict[str, Any] | None = None

    @classmethod
    def from_dict(cls, values: dict[Hidden, Any]) -> HiddenHolder:
        """Builds the values from `{Hidden member: value}`."""
        return cls(**{Hidden(key).name: value for key, value in values.items()})


@dataclass
class Schema:
    """Names, inputs and outputs of a node."""

    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list[Input] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    hidden: list[Hidden] = field(default_factory=list)
    description: str = ""
    is_output_node: bool = False
    is_deprecated: bool = False
    is_experimental: bool = False
    not_idempotent: bool = False

    def finalize(self) -> None:
        """Names the unnamed outputs, and adds hidden inputs for the graph that output nodes write into files."""
        if self.is_output_node:
            graph_values = (Hidden.prompt, Hidden.extra_pnginfo)
            self.hidden = self.hidden + [hidden for hidden in graph_values if hidden not in self.hidden]
        for index, output in enumerate(self.outputs):
            if output.id is None:
                output.id = f"_{index}_{output.io_type}_"

    def validate(self) -> None:
        """Raises ValueError unless every input and output has an id of its own."""
        counts = Counter([entry.id for entry in self.inputs] + [entry.id for entry in self.outputs])
        repeated = [name for name, count in counts.items() if count > 1]
        if repeated:
            raise ValueError(f"Ids of inputs and outputs must be unique, but {repeated} are not.")

    def input_types(self) -> dict[str, dict[str, tuple]]:
        """{"required" | "optional": {id: (type, options)}, "hidden": {id: (name,)}}"""
        table: dict[str, dict[str, tuple]] = {"required": {}}
        for entry in self.inputs:
            options = entry.as_dict()
            kind = "optional" if options.pop("optional") else "required"
            table.setdefault(kind, {})[entry.id] = (entry.get_io_type(), options)
        for hidden in self.hidden:
            table.setdefault("hidden", {})[hidden.name] = (hidden.value,)
        return table


class NodeOutput:
    """Result of `execute`: one value for each output, and `ui`, the data that the node shows."""

    def __init__(self, *args: Any, ui: dict[str, Any] | None = None):
        self.args = args
        self.ui = ui

    @property
    def result(self) -> tuple | None:
        """Outputs, or None without any."""
        return self.args or None

    def __getitem__(self, index: int) -> Any:
        return self.args[index]


class ComfyNode(ABC):
    """Base of all nodes. Classes are never instantiated and hold no state: `execute` is a class method.

    A node may also define `validate_inputs(...) -> True or a message` and `fingerprint_inputs(...) -> value`,
    whose value must differ when the node should run again although its inputs are the same.
    """

    hidden = HiddenHolder()
    execute: Callable[..., NodeOutput]

    @classmethod
    @abstractmethod
    def define_schema(cls) -> Schema:
        """Builds the node's schema, anew for each call because lists of files may have changed."""

    @classmethod
    def GET_SCHEMA(cls) -> Schema:  # noqa: N802 (the host's name)
        """Returns the schema, completed and checked."""
        schema = cls.define_schema()
        schema.finalize()
        schema.validate()
        return schema

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple]]:  # noqa: N802 (the host's name)
        """Inputs as the host's validation reads them."""
        return cls.GET_SCHEMA().input_types()

    @classmethod
    def GET_NODE_INFO_V1(cls) -> dict[str, Any]:  # noqa: N802 (the host's name)
        """Entry of this node in ComfyUI's `/object_info`."""
        schema = cls.GET_SCHEMA()
        inputs = schema.input_types()
        return {
            "input": inputs,
            "input_order": {kind: list(entries) for kind, entries in inputs.items()},
            "output": [output.io_type for output in schema.outputs],
            "output_is_list": [False for _ in schema.outputs],
            "output_name": [output.display_name or output.io_type for output in schema.outputs],
            "output_tooltips": [output.tooltip or None for output in schema.outputs],
            "name": schema.node_id,
            "display_name": schema.display_name,
            "description": schema.description,
            "python_module": None,
            "category": schema.category,
            "output_node": schema.is_output_node,
            "deprecated": schema.is_deprecated,
            "experimental": schema.is_experimental,
            "api_node": False,
        }


class ComfyExtension(ABC):
    """Pack of nodes."""

    async def on_load(self) -> None:  # noqa: B027 (packs may leave it)
        """Hook that newer hosts call once (ComfyUI 0.3.64 does not)."""

    @abstractmethod
    async def get_node_list(self) -> list[type[ComfyNode]]:
        """Returns the node classes of this pack."""


__all__ = [
    "Boolean",
    "Clip",
    "ClipVision",
    "ClipVisionOutput",
    "Combo",
    "ComfyExtension",
    "ComfyNode",
    "Conditioning",
    "ControlNet",
    "Custom",
    "Float",
    "FolderType",
    "Hidden",
    "HiddenHolder",
    "Image",
    "Input",
    "Int",
    "Latent",
    "Mask",
    "Model",
    "NodeOutput",
    "NumberDisplay",
    "Output",
    "Sampler",
    "Schema",
    "Sigmas",
    "String",
    "UploadType",
    "Vae",
    "WidgetInput",
]
