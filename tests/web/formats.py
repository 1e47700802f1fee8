"""Workflows in ComfyUI's two formats: the graph that its interface saves, and the prompt that its server runs.

The first holds places, colours and notes and names widgets by their order alone; the second names every input.
Plain graphs only: no subgraphs, no muted or bypassed nodes, no reroutes.
"""

from __future__ import annotations

from typing import Any

from cascade_nodes.headless.registry import InputInfo, NodeInfo, available_nodes, describe

Graph = dict[str, Any]

NOTES = {"Note", "MarkdownNote"}  # known to the interface alone
SEED_CONTROLS = ("fixed", "randomize")  # the widget below a seed: what becomes of it after a run
UPLOAD = "image"  # the button below the name of a picture, which is saved with the widgets
LAYOUT = ("pos", "size", "flags", "order", "mode", "properties", "title", "color", "bgcolor")


def schemas() -> dict[str, NodeInfo]:
    """Our nodes, and those of ComfyUI's that the embedded host has."""
    return {name: describe(node) for name, node in available_nodes().items()}


def is_widget(info: InputInfo) -> bool:
    """Whether an input is a field in its node, which may still be linked, or a socket alone."""
    return info.type in ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN")


def has_control(info: InputInfo) -> bool:
    """Whether the interface puts the seed control below this widget."""
    return bool(info.options.get("control_after_generate"))


def has_upload(info: NodeInfo) -> bool:
    """Whether the interface puts the button for another picture below a node's widgets."""
    return any(entry.options.get("image_upload") for entry in info.inputs.values())


def to_api(ui: Graph, nodes: dict[str, NodeInfo]) -> Graph:
    """The prompt of a graph. ValueError for what only the real front end can convert."""
    links = {link[0]: [str(link[1]), link[2]] for link in ui["links"]}
    prompt = {}
    for node in sorted(ui["nodes"], key=lambda node: int(node["id"])):
        if node["type"] in NOTES:
            continue
        if node.get("mode", 0) != 0 or node["type"] not in nodes:
            raise ValueError(f"node {node['id']} ({node['type']}) is muted, bypassed or unknown")
        info = nodes[node["type"]]
        values = iter(node.get("widgets_values", []))
        inputs = {}
        for name, entry in info.inputs.items():
            if is_widget(entry):
                inputs[name] = next(values)
                if has_control(entry):
                    next(values)
        for socket in node["inputs"]:
            if socket["link"] is not None:
                inputs[socket["name"]] = links[socket["link"]]
        title = node.get("title") or info.cls.GET_SCHEMA().display_name
        prompt[str(node["id"])] = {
            "class_type": node["type"],
            "inputs": {name: inputs[name] for name in info.inputs if name in inputs},
            "_meta": {"title": title},
        }
    return prompt


def layout_of(ui: Graph) -> Graph:
    """What a graph has beside its prompt: places, notes, groups."""
    return {
        "nodes": {str(n["id"]): {key: n[key] for key in LAYOUT if key in n} for n in ui["nodes"]},
        "controls": {str(n["id"]): seed_control(n["widgets_values"]) for n in ui["nodes"]},
        "notes": [node for node in ui["nodes"] if node["type"] in NOTES],
        "rest": {key: ui[key] for key in ui if key not in ("nodes", "links")},
    }


def seed_control(values: list[Any]) -> str:
    """What a node's widgets say of its seed after a run."""
    return next((value for value in values if value in SEED_CONTROLS), SEED_CONTROLS[0])


def to_ui(prompt: Graph, nodes: dict[str, NodeInfo], layout: Graph) -> Graph:
    """The graph of a prompt, laid out as given."""
    links: list[list[Any]] = []
    ui_nodes = {}
    for key, node in prompt.items():
        info = nodes[node["class_type"]]
        ordered = sorted(info.inputs, key=lambda name: is_widget(info.inputs[name]))  # sockets come first
        sockets: list[Graph] = []
        for name in ordered:
            entry = info.inputs[name]
            socket: Graph = {"name": name, "type": entry.type, "link": None}
            if is_widget(entry):
                socket["widget"] = {"name": name}
            sockets.append(socket)
            value = node["inputs"].get(name)
            if isinstance(value, list):
                socket["link"] = len(links) + 1
                links.append(
                    [len(links) + 1, int(value[0]), value[1], int(key), len(sockets) - 1, entry.type]
                )
        outputs = [
            {"name": output.display_name or output.io_type, "type": output.io_type, "links": []}
            for output in info.cls.GET_SCHEMA().outputs
        ]
        ui_nodes[key] = {
            "id": int(key),
            "type": node["class_type"],
            "inputs": sockets,
            "outputs": outputs,
            "widgets_values": list(widget_values(node["inputs"], info, layout["controls"][key])),
            **layout["nodes"].get(key, {}),
        }
    for number, source, slot, *_ in links:
        ui_nodes[str(source)]["outputs"][slot]["links"].append(number)
    return {**layout["rest"], "nodes": [*ui_nodes.values(), *layout["notes"]], "links": links}


def widget_values(inputs: Graph, info: NodeInfo, control: str):
    """The values of a node's widgets in their order; a linked one keeps its default."""
    for name, entry in info.inputs.items():
        if is_widget(entry):
            value = inputs.get(name)
            yield entry.options.get("default") if isinstance(value, list) or value is None else value
            if has_control(entry):
                yield control
    if has_upload(info):
        yield UPLOAD
