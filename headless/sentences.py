"""ComfyUI's validation errors as sentences: which node, which input, what arrived, what was expected."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any

from ..cascade_core.errors import CascadeError, excerpt, printable, quoted

Error = dict[str, Any]

_MOST_LINES = 20
_MOST_CHOICES = 20
_KINDS = {"INT": "a whole number (INT)", "FLOAT": "a number (FLOAT)", "BOOLEAN": "true or false (BOOLEAN)"}
_LONGEST_NAME = 100  # characters of a class's name that are compared with existing names


class GraphError(CascadeError):
    """Graph that cannot be executed: one line for each fault.

    `error` and `node_errors` are ComfyUI's.
    """

    def __init__(self, error: Error | None, node_errors: dict[str, Error], node_types: Iterable[str] = ()):
        super().__init__("\n".join(sentences(error, node_errors, node_types)))
        self.error = error
        self.node_errors = node_errors


def sentences(
    error: Error | None, node_errors: dict[str, Error], node_types: Iterable[str] = ()
) -> list[str]:
    """Sentences for all faults, without repetitions. `node_types`: the known ones, for hints."""
    lines = [
        _sentence(node_id, entry["class_type"], reason)
        for node_id, entry in node_errors.items()
        for reason in _joined(entry["errors"])
    ]
    if error is not None and not lines:
        lines = [_whole_graph(error, list(node_types))]
    return shortened(list(dict.fromkeys(lines)))


def shortened(lines: list[str]) -> list[str]:
    """The first lines, and a note that there are more."""
    return (
        lines
        if len(lines) <= _MOST_LINES
        else [*lines[:_MOST_LINES], "There are more faults; mend these first."]
    )


def _name(value: object, limit: int = 80) -> str:
    """A node's id or class, an input's type or an option, from a graph or a server, made printable."""
    return printable(value if isinstance(value, str) else quoted(value), limit)


def _joined(reasons: list[Error]) -> list[Error]:
    """Merges a node's own objection, which ComfyUI repeats for every input that the node looked at."""
    joined: list[Error] = []
    objections: dict[str, list[str]] = {}
    for reason in reasons:
        if reason["type"] != "custom_validation_failed":
            joined.append(reason)
            continue
        name, _, objection = reason["details"].partition(" - ")
        if objection not in objections:
            objections[objection] = []
            extra = {"input_names": objections[objection], "objection": objection}
            joined.append({**reason, "extra_info": extra})
        objections[objection].append(name)
    return joined


def _whole_graph(error: Error, node_types: list[str]) -> str:
    extra = error.get("extra_info") or {}
    node_id, class_type = extra.get("node_id"), str(extra.get("class_type") or "")
    if error["type"] == "prompt_no_outputs":
        return "The graph has no output node such as SaveImage, so there is nothing to make."
    if error["type"] == "missing_node_type" and not class_type:
        return (
            f"Node {_name(node_id)} has no class_type, which must name a node (`cascade nodes` lists them)."
        )
    if error["type"] == "missing_node_type":
        hint = "`cascade nodes` lists those there are."
        if node_types:  # None for a server, which has other nodes
            # Meant for typing errors: names of ComfyUI's other nodes often begin or end alike.
            close = get_close_matches(class_type[:_LONGEST_NAME], node_types, n=1, cutoff=0.8)
            elsewhere = "run with --server, on a ComfyUI that has it"
            hint = (
                f"did you mean {close[0]}? Else {elsewhere}."
                if close
                else f"{elsewhere}, or see `cascade nodes`."
            )
        return f"Node {_name(node_id)}: there is no node {quoted(class_type)}; {hint}"
    details = f" ({excerpt(error['details'], 500)})" if error.get("details") else ""
    return f"{excerpt(error['message'].rstrip('.'), 500)}{details}."


def _sentence(node_id: str, class_type: str, reason: Error) -> str:
    extra = reason.get("extra_info") or {}
    wording = _WORDINGS.get(reason["type"])
    if wording is None:
        text = excerpt(reason["message"], 500)
        text += f": {excerpt(reason['details'], 500)}" if reason["details"] else ""
    else:
        text = wording(reason, extra)
    if reason["type"] == "dependency_cycle":
        return text
    return f"Node {_name(node_id)} ({_name(class_type)}): {text}"


def _options(extra: Error) -> tuple[str | list[Any], dict[str, Any]]:
    """Type and options of the input that an error is about."""
    config = extra.get("input_config") or ["", {}]
    return config[0], config[1]


def _missing(reason: Error, extra: Error) -> str:
    return f"the required input {quoted(extra['input_name'])} is missing; give it a value or connect it."


def _bad_link(reason: Error, extra: Error) -> str:
    _, _, reason_text = reason["details"].partition(": ")
    text = f"input {quoted(extra['input_name'])} is connected to {quoted(extra['received_value'])}"
    return f"{text}, but {excerpt(reason_text, 500) or 'a link is [node id, output index]'}."


def _mismatch(reason: Error, extra: Error) -> str:
    source, slot = extra["linked_node"]
    text = f"input {quoted(extra['input_name'])} is connected to output {_name(slot)} of node {_name(source)}"
    return f"{text}, which gives {_name(extra['received_type'])}, but it takes {_name(_options(extra)[0])}."


def _wrong_type(reason: Error, extra: Error) -> str:
    text = f"input {quoted(extra['input_name'])} is {quoted(extra['received_value'])}"
    kind = _options(extra)[0]
    return f"{text}, but it takes {_KINDS.get(kind) if isinstance(kind, str) and kind in _KINDS else _name(kind)}."


def _on_socket(reason: Error, extra: Error) -> str:
    kind = _name(_options(extra)[0])
    value = quoted(extra["received_value"])
    return f"input {quoted(extra['input_name'])} is {value}, but it takes a connection that gives {kind}; connect one."


def _out_of_range(reason: Error, extra: Error) -> str:
    _, options = _options(extra)
    low, high = options.get("min"), options.get("max")
    if low is not None and high is not None:
        expected = f"between {_name(low)} and {_name(high)}"
    else:
        expected = f"at least {_name(low)}" if low is not None else f"at most {_name(high)}"
    return f"input {quoted(extra['input_name'])} is {quoted(extra['received_value'])}, but it must be {expected}."


def _not_in_list(reason: Error, extra: Error) -> str:
    kind, options = _options(extra)
    # Older nodes have the list in place of the type.
    choices = kind if isinstance(kind, list) else options.get("options", [])
    listed = ", ".join(map(_name, choices[:_MOST_CHOICES])) or "nothing: the list is empty"
    if len(choices) > _MOST_CHOICES:
        listed += f", … ({len(choices)} in all)"
    if extra.get("input_config") is None:
        listed = "a long list (see `cascade nodes`)"
    return f"input {quoted(extra['input_name'])} is {quoted(extra['received_value'])}, but it must be one of: {listed}."


def _custom(reason: Error, extra: Error) -> str:
    names = ", ".join(map(quoted, extra["input_names"][:_MOST_CHOICES]))
    text = excerpt(extra["objection"]) or "the node does not accept this"
    plural = "s" if len(extra["input_names"]) > 1 else ""
    return f"input{plural} {names}: {text}{'' if text.endswith(('.', '!', '?')) else '.'}"


def _cycle(reason: Error, extra: Error) -> str:
    return (
        f"The graph runs in a circle, {excerpt(reason['details'], 500)}; take out one of these connections."
    )


def _exception(reason: Error, extra: Error) -> str:
    return f"checking its inputs failed with {_name(extra['exception_type'])}: {excerpt(reason['details'], 500)}."


_WORDINGS: dict[str, Callable[[Error, Error], str]] = {
    "required_input_missing": _missing,
    "bad_linked_input": _bad_link,
    "return_type_mismatch": _mismatch,
    "invalid_input_type": _wrong_type,
    "value_on_socket": _on_socket,
    "value_smaller_than_min": _out_of_range,
    "value_bigger_than_max": _out_of_range,
    "value_not_in_list": _not_in_list,
    "custom_validation_failed": _custom,
    "dependency_cycle": _cycle,
    "exception_during_validation": _exception,
    "exception_during_inner_validation": _exception,
}
