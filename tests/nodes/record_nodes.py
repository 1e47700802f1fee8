"""Writes frozen_nodes.json anew, which holds what saved workflows rely on: it only ever gains entries.

python -m cascade_nodes.tests.nodes.record_nodes
"""

import json
import sys
from pathlib import Path
from typing import Any

from cascade_nodes.nodes.extension import NODES

FROZEN = Path(__file__).parent / "frozen_nodes.json"
FILE_INPUTS = ("file", "previewer", "stage_c", "text_encoder", "compressor")
Form = dict[str, Any]


def frozen_form(info: Form) -> Form:
    """What workflows rely on: inputs with their types and options, and outputs; without lists of files."""
    inputs = {}
    for kind in ("required", "optional"):
        for name, (socket, options) in info["input"].get(kind, {}).items():
            limits = {key: options[key] for key in ("default", "min", "max") if key in options}
            if socket == "COMBO" and name not in FILE_INPUTS:
                limits["options"] = options["options"]
            if socket == "COMBO" and name in FILE_INPUTS:
                limits.pop("default", None)
            inputs[name] = [socket, kind, limits]
    return {
        "inputs": inputs,
        "outputs": [list(pair) for pair in zip(info["output"], info["output_name"], strict=True)],
    }


def frozen_forms() -> dict[str, Form]:
    """Frozen forms of every node, by id."""
    infos = (node.GET_NODE_INFO_V1() for node in NODES)
    return {info["name"]: frozen_form(info) for info in infos}


def lost(before: dict[str, Form], now: dict[str, Form]) -> list[str]:
    """What saved workflows rely on and would not find: a node may gain optional inputs, choices and last outputs."""
    changes = [f"{node} is gone" for node in before if node not in now]
    for node, form in before.items():
        inputs, outputs = (now[node]["inputs"], now[node]["outputs"]) if node in now else ({}, [])
        for name, (socket, kind, limits) in form["inputs"].items() if node in now else ():
            new_socket, new_kind, new_limits = inputs.get(name, (None, None, {}))
            choices = set(limits.get("options", ())) <= set(new_limits.get("options", ()))
            rest = {key: value for key, value in limits.items() if key != "options"}
            if (
                (socket, kind) != (new_socket, new_kind)
                or not choices
                or not rest.items() <= new_limits.items()
            ):
                changes.append(f"{node}.{name} is not what it was")
        if node in now and form["outputs"] != outputs[: len(form["outputs"])]:
            changes.append(f"the outputs of {node} are not what they were")
        changes += [
            f"{node}.{name} is new and required"
            for name, (_, kind, _) in inputs.items()
            if name not in form["inputs"] and kind == "required"
        ]
    return changes


if __name__ == "__main__":
    forms = frozen_forms()
    if changes := lost(json.loads(FROZEN.read_text(encoding="utf-8")), forms):
        sys.exit("Saved workflows would break: " + "; ".join(changes) + ".")
    FROZEN.write_text(json.dumps(forms, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
