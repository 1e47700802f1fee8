"""Checks of one node's inputs, in ComfyUI's order and words.

https://github.com/comfyanonymous/ComfyUI, `execution.py`, `validate_inputs` (version 0.33). They differ where ComfyUI
silently goes wrong: for a value where only a link is possible, such as a number for an IMAGE, which fails during the
run; for 1.5 as an INT, which becomes 1; and for "false" as a BOOLEAN, which counts as true. Here "false" is false,
and the others are refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..cascade_core.errors import printable, quoted
from .graph import Graph, is_link, name_of, truth, whole_number
from .registry import InputInfo, NodeInfo, parameters_of

_CONVERSIONS = {"INT": whole_number, "FLOAT": float, "STRING": str, "BOOLEAN": truth}
_LONGEST_LIST = 20  # longer lists of options are counted in messages, not written out


@dataclass(frozen=True)
class NodeCheck:
    """Errors of one node itself, and the targets of its well-formed links: (input, node)."""

    errors: list[dict[str, Any]]
    sources: list[tuple[str, str]]


class _Rejected(Exception):  # noqa: N818 (carries an error and is not one)
    """Rejection of one input, with ComfyUI's error dictionary."""

    def __init__(self, kind: str, message: str, details: str, **extra: Any):
        super().__init__(message)
        self.error = {"type": kind, "message": message, "details": details, "extra_info": extra}


def check_node(node_id: str, graph: Graph, nodes: dict[str, NodeInfo]) -> NodeCheck:
    """Checks one node and converts its values in place, as ComfyUI does."""
    inputs = graph[node_id]["inputs"]
    info = nodes[graph[node_id]["class_type"]]
    names, any_name = parameters_of(info.checks) if info.checks else (set(), False)
    errors, sources, received_types = [], [], {}
    for name, entry in info.inputs.items():
        try:
            if name not in inputs:
                if entry.required:
                    message = "Required input is missing"
                    raise _Rejected("required_input_missing", message, name, input_name=name)
            elif isinstance(inputs[name], list):
                source, received_types[name] = _resolve_link(name, entry, inputs[name], graph, nodes)
                if "input_types" not in names:
                    _check_types(name, entry, inputs[name], received_types[name])
                sources.append((name, source))
            else:
                inputs[name] = _convert(name, entry, inputs[name])
                if name not in names and not any_name:
                    _check_limits(name, entry, inputs[name])
                    _check_options(name, entry, inputs[name])
        except _Rejected as rejected:
            errors.append(rejected.error)
    if info.checks is not None:
        wrong = {error["extra_info"]["input_name"] for error in errors}
        errors += _custom_errors(info, inputs, received_types, wrong)
    return NodeCheck(errors, sources)


def _config(entry: InputInfo) -> tuple[str, dict[str, Any]]:
    return entry.type, entry.options


def _resolve_link(
    name: str, entry: InputInfo, link: list[Any], graph: Graph, nodes: dict[str, NodeInfo]
) -> tuple[str, str]:
    """Node that a link leads to, and the type of that output."""
    extra = {"input_name": name, "input_config": _config(entry), "received_value": link}
    expected = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
    if len(link) != 2:
        raise _Rejected("bad_linked_input", expected, name, **extra)
    if not is_link(link):
        raise _Rejected(
            "bad_linked_input", expected, f"{name}: {quoted(link)} is not [text, whole number]", **extra
        )
    source, slot = link
    if source not in graph:
        details = f"{name}: there is no node {_shown(source)} in the graph"
        raise _Rejected("bad_linked_input", expected, details, **extra)
    class_type = graph[source]["class_type"]
    outputs = nodes[class_type].outputs
    if not 0 <= slot < len(outputs):
        details = f"{name}: node {name_of(graph, source)} has {len(outputs)} outputs, none with index {_shown(slot)}"
        raise _Rejected("bad_linked_input", expected, details, **extra)
    return source, outputs[slot]


def _check_types(name: str, entry: InputInfo, link: list[Any], received: str) -> None:
    if _compatible(received, entry.type):
        return
    raise _Rejected(
        "return_type_mismatch",
        "Return type mismatch between linked nodes",
        f"{name}, received_type({received}) mismatch input_type({entry.type})",
        input_name=name,
        input_config=_config(entry),
        received_type=received,
        linked_node=link,
    )


def _compatible(received: str, expected: str) -> bool:
    """Whether two type names, each possibly several separated by commas, have one in common; * is any."""
    received_types, expected_types = set(received.split(",")), set(expected.split(","))
    return "*" in received_types | expected_types or bool(received_types & expected_types)


def _convert(name: str, entry: InputInfo, value: Any) -> Any:
    """Converts a value to its input's type; rejects NaN and infinity."""
    if isinstance(value, dict) and "__value__" in value:  # the form of a list that is a value, not a link
        value = value["__value__"]
    if entry.type == "COMBO":
        return value
    convert = _CONVERSIONS.get(entry.type)
    if convert is None:
        if value is None and not entry.required:  # counts as left out
            return None
        raise _Rejected(
            "value_on_socket",
            "A value is given where a connection is needed",
            f"{name}, {_shown(value)}, {entry.type}",
            input_name=name,
            input_config=_config(entry),
            received_value=value,
        )
    try:
        converted = convert(value)
        if isinstance(converted, float) and not math.isfinite(converted):
            raise ValueError(f"{converted} is not a finite number")
    except (TypeError, ValueError, OverflowError) as error:
        raise _Rejected(
            "invalid_input_type",
            f"Failed to convert an input value to a {entry.type} value",
            f"{name}, {_shown(value)}, {_shown(str(error))}",
            input_name=name,
            input_config=_config(entry),
            received_value=value,
            exception_message=_shown(str(error)),
        ) from error
    return converted


def _shown(value: Any) -> str:
    return printable(value) if isinstance(value, str) else quoted(value, 200)


def _check_limits(name: str, entry: InputInfo, value: Any) -> None:
    extra = {"input_name": name, "input_config": _config(entry), "received_value": value}
    low, high = entry.options.get("min"), entry.options.get("max")
    if low is not None and value < low:
        raise _Rejected(
            "value_smaller_than_min", f"Value {_shown(value)} smaller than min of {low}", name, **extra
        )
    if high is not None and value > high:
        raise _Rejected(
            "value_bigger_than_max", f"Value {_shown(value)} bigger than max of {high}", name, **extra
        )


def _check_options(name: str, entry: InputInfo, value: Any) -> None:
    if entry.type != "COMBO":
        return
    options = entry.options.get("options", [])
    if value in options:
        return
    long = len(options) > _LONGEST_LIST
    listed = f"(list of length {len(options)})" if long else str(options)
    raise _Rejected(
        "value_not_in_list",
        "Value not in list",
        f"{name}: {quoted(value, 200)} not in {listed}",
        input_name=name,
        input_config=None if long else _config(entry),
        received_value=value,
    )


def _custom_errors(
    info: NodeInfo, inputs: dict[str, Any], received_types: dict[str, str], wrong: set[str]
) -> list[dict[str, Any]]:
    """Calls the node's own `validate_inputs`: connected inputs arrive as None; one error per input it looks at.

    It is not called where an input that it looks at is missing or already wrong.
    """
    assert info.checks is not None
    names, any_name = parameters_of(info.checks)
    if wrong & (set(info.inputs) if any_name else names):
        return []
    values = {
        name: None if is_link(value) else value
        for name, value in inputs.items()
        if name in info.inputs and (name in names or any_name)
    }
    extra = {"input_types": received_types} if "input_types" in names else {}
    answer = info.checks(**values, **extra)
    if answer is True:
        return []
    reason = "" if answer is False else f" - {answer}"
    return [
        {
            "type": "custom_validation_failed",
            "message": "Custom validation failed for node",
            "details": f"{name}{reason}",
            "extra_info": {"input_name": name},
        }
        for name in [*values, *extra]
    ]
