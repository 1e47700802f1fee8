"""Writes comfyui.json: what ComfyUI itself says of the toy nodes and of valid and invalid graphs of them.

    python tests/headless/record_comfyui.py object_info PATH_TO_COMFYUI_0.3.64
    python tests/headless/record_comfyui.py validation PATH_TO_COMFYUI_0.33.0

Each prints a summary and replaces its own part of the file. Needs ComfyUI's requirements installed.
"""

from __future__ import annotations

import asyncio
import copy
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORD = HERE / "comfyui.json"


def node(class_type: str, title: str | None = None, **inputs: Any) -> dict[str, Any]:
    meta = {"_meta": {"title": title}} if title else {}
    return {"class_type": class_type, "inputs": inputs} | meta


def show(source: Any) -> dict[str, Any]:
    return node("ToyShow", toy=source)


def number(**inputs: Any) -> dict[str, Any]:
    return {"1": node("ToyNumber", **inputs), "2": show(["1", 0])}


def text(**inputs: Any) -> dict[str, Any]:
    return {"1": node("ToyText", **inputs), "2": show(["1", 0])}


def pair(**inputs: Any) -> dict[str, Any]:
    return {"1": node("ToyPair", **inputs), "2": show(["1", 0])}


CYCLE = {"1": node("ToyJoin", left=["2", 0]), "2": node("ToyJoin", left=["1", 0])}

GRAPHS: dict[str, dict[str, Any]] = {
    "valid": number(value=3, scale=0.5),
    "converted": {
        "1": node("ToyNumber", value="7", scale="1.5"),
        "2": node("ToyText", text=5, mode="hard", flip=1),
        "3": node("ToyJoin", left=["1", 0], right=["2", 0]),
        "4": show(["3", 0]),
    },
    "a float for a whole number": number(value=2.9),
    "wrapped value": number(value={"__value__": 4}),
    "unknown inputs are ignored": number(value=1, colour="red"),
    "optional left out": number(value=1) | {"2": node("ToyJoin", left=["1", 0]), "3": show(["2", 0])},
    "required_input_missing": number(),
    "two required inputs missing": text(),
    "bad_linked_input": number(value=["1"]),
    "bad_linked_input, too long": {"1": node("ToyNumber", value=1), "2": show(["1", 0, 0])},
    "return_type_mismatch": {"1": node("ToyImage"), "2": show(["1", 0])},
    "return_type_mismatch, value": {
        "1": node("ToyText", text="a", mode="soft"),
        "2": node("ToyNumber", value=["1", 1]),
        "3": show(["2", 0]),
    },
    "mismatch hides what is upstream": {
        "1": node("ToyNumber"),
        "2": node("ToyImage", mask=["1", 0]),
        "3": node("ToyShow", toy=["4", 0], image=["2", 0]),
        "4": node("ToyNumber", value=1),
    },
    "invalid_input_type, INT": number(value="many"),
    "invalid_input_type, FLOAT": number(value=1, scale="wide"),
    "invalid_input_type, None": number(value=None),
    "value_smaller_than_min, INT": number(value=-1),
    "value_smaller_than_min, FLOAT": number(value=1, scale=-2.6),
    "value_bigger_than_max, INT": number(value=101),
    "value_bigger_than_max, FLOAT": number(value=1, scale="2.51"),
    "two errors on one node": number(value=101, scale="wide"),
    "value_not_in_list": text(text="a", mode="rough"),
    "value_not_in_list, long": text(text="a", mode="soft", many="option 21"),
    "value_not_in_list, number": text(text="a", mode=3),
    "custom_validation_failed": pair(a=1, b=2),
    "custom validation passed, its own ranges": pair(a=11, b=101),
    "custom validation, connected": {
        "1": node("ToyCount"),
        "2": node("ToyPair", a=["1", 0], b=3, c=11),
        "3": show(["2", 0]),
    },
    "custom validation passed, connected": {
        "1": node("ToyCount"),
        "2": node("ToyPair", a=["1", 0], b=2),
        "3": show(["2", 0]),
    },
    "custom validation beside a range": pair(a=1, b=3, c=11),
    "exception_during_inner_validation": pair(a=13, b=1),
    "prompt_no_outputs": {"1": node("ToyNumber", value=1)},
    "prompt_no_outputs, though invalid": {"1": node("ToyNumber")},
    "missing_node_type": {"1": node("ToyNomber", value=1), "2": show(["1", 0])},
    "missing_node_type, titled": {"1": node("Gone", "My node"), "2": show(["1", 0])},
    "missing_node_type, no class": {"1": {"inputs": {}}, "2": show(["1", 0])},
    "missing_node_type, no class, titled": {"1": {"inputs": {}, "_meta": {"title": "Lost"}}},
    "dependency_cycle": CYCLE | {"3": show(["1", 0])},
    "dependency_cycle of one": {"1": node("ToyJoin", left=["1", 0]), "2": show(["1", 0])},
    "dependency_cycle beside another error": {
        "1": node("ToyJoin", left=["2", 0], count=0),
        "2": node("ToyJoin", left=["1", 0]),
        "3": show(["2", 0]),
    },
    "deep": {
        "1": node("ToyNumber", value=-5),
        "2": node("ToyJoin", left=["1", 0]),
        "3": node("ToyJoin", left=["2", 0]),
        "4": show(["3", 0]),
    },
    "one output of two": {"1": node("ToyNumber", value=1), "2": show(["1", 0]), "3": show(["1"])},
    "invalid beside the outputs": number(value=1) | {"3": node("ToyNumber", value=101)},
    "error seen from two outputs": number(value=101) | {"3": show(["1", 0])},
}


def canonical(entry: dict[str, Any]) -> dict[str, Any]:
    """ComfyUI walks over sets, so the order of errors and outputs is chance; traces hold paths."""
    for node_error in entry["node_errors"].values():
        node_error["errors"].sort(key=lambda error: (error["type"], error["details"]))
        node_error["dependent_outputs"] = sorted(set(node_error["dependent_outputs"]))
        for error in node_error["errors"]:
            error["extra_info"].pop("traceback", None)
    if entry["error"]:
        entry["error"]["details"] = "\n".join(sorted(entry["error"]["details"].split("\n")))
    entry["outputs"].sort()
    return entry


def record_validation(execution: Any) -> dict[str, Any]:
    record = {}
    for name, graph in GRAPHS.items():
        checked = copy.deepcopy(graph)
        _, error, outputs, node_errors = asyncio.run(execution.validate_prompt("prompt", checked, None))
        entry = {"error": error, "outputs": outputs, "node_errors": node_errors}
        converted = {node_id: node["inputs"] for node_id, node in checked.items()}
        record[name] = {"graph": graph, "converted": converted, **canonical(json.loads(json.dumps(entry)))}
    return record


def main() -> None:
    part, comfyui = sys.argv[1:3]
    sys.argv = sys.argv[:1]
    sys.path.insert(0, comfyui)
    import_module("comfy.cli_args").args.cpu = True
    execution, nodes = import_module("execution"), import_module("nodes")
    from cascade_nodes.tests.headless.toy_nodes import TOYS  # now that it finds ComfyUI's API

    nodes.NODE_CLASS_MAPPINGS.update(TOYS)
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if part == "object_info":
        record[part] = {name: cls.GET_NODE_INFO_V1() for name, cls in TOYS.items()}
    else:
        record[part] = record_validation(execution)
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    print(f"{part}: {len(record[part])} entries")  # noqa: T201


if __name__ == "__main__":
    main()
