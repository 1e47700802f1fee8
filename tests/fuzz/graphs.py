"""Mutated graphs through `run_graph` and `cascade run`, on the demo's networks at the smallest sizes.

Whatever is valid stays cheap: numbers that a schema allows are capped, what it must refuse is left as it is.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

import cascade_nodes
from cascade_nodes.headless.registry import available_nodes, describe
from cascade_nodes.headless.run import run_graph
from cascade_nodes.tests.fuzz.values import TEXTS, odd_number, odd_structure, odd_text, odd_value
from cascade_nodes.tests.fuzz.verdict import command, files_below

EXAMPLES = Path(cascade_nodes.__file__).parent / "example_workflows" / "api"
PICTURES = ("cascade_scene.png", "cascade_hole.png", "cascade_narrow.png", "cascade_small.png")
LARGEST = {  # allowed values above these are set to them
    "width": 96, "height": 96, "steps": 1, "batch_size": 2, "size": 96, "left": 32, "right": 32, "top": 32,
    "bottom": 32,
    "scale": 2.0, "feather": 64, "rank": 4, "vectors": 4, "grow": 4,
}  # fmt: skip
SMALLEST = {"compression": 16.0}  # a smaller one makes larger latents
PROMPTS = (
    "((((((((", "))))", "(a:1e400)", "(a:nan)", "(a:-5)", "(a:1.5", "\\(a\\)", "\\",
    "(" * 3000 + "a" + ")" * 3000, "a " * 400,
    "embedding:gone", "embedding:../x", "embedding:", "[loop]", "[" * 100, "(:1)", "(a:)", "a:1.2",
    "<|endoftext|>", "😀" * 100, "a\u0301" * 50,
)  # fmt: skip
NAMES = (
    "fifo.png", "fifo.safetensors", "folder.png", "folder.safetensors", "loop.png", "empty.png", "text.png",
    "empty.safetensors",
    "cascade_scene.png [input]", "x.png [output]", "x [temp]", "../input/cascade_scene.png",
    ".\\cascade_scene.png", "input\\cascade_scene.png",
    "/dev/zero", "/dev/urandom", "/proc/self/environ", "/proc/kcore", "/dev/stdin", "model.gguf", "model.pt",
    "model.ckpt",
)  # fmt: skip
# Where training nodes write.
TRAINED = ("models/loras/", "models/controlnet/", "models/embeddings/", "models/training/")
PREFIXES = (
    "stars/red", "a/b/c/d", "%year%-%month%", "%width%x%height%", "%batch_num%", "temp/x", "x/", "./x", "../x",
    "link/x", "a/../b",
    "a\\b", "ComfyUI_00001_", "x_99999999999999999999", "x" * 250, "ü" * 120, ".", "..", "...", " ", "a:b",
    "taken/x", "nul", "%date:yyyy%",
)  # fmt: skip


class World:
    """A folder with pictures, obstacles and a folder for outputs; the demo's weights are found by themselves."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.input, self.output = folder / "input", folder / "output"
        self.input.mkdir()
        for index, name in enumerate(PICTURES):
            mode = "RGBA" if name == "cascade_hole.png" else "RGB"
            side = 24 if name == "cascade_small.png" else 64
            picture = Image.radial_gradient("L").resize((side, side)).convert(mode)
            if mode == "RGBA":
                picture.putalpha(picture.getchannel(0))
            picture.rotate(index * 90).save(self.input / name)
        for where in (folder, self.input):
            for suffix in (".png", ".safetensors"):
                os.mkfifo(where / f"fifo{suffix}")
                (where / f"folder{suffix}").mkdir()
                (where / f"empty{suffix}").write_bytes(b"")
            (where / "text.png").write_text("no picture")
            (where / "loop.png").symlink_to("loop.png")
        (folder / "pictures").mkdir()
        for index in range(3):
            shutil.copy(self.input / PICTURES[0], folder / "pictures" / f"{index}.png")
            (folder / "pictures" / f"{index}.txt").write_text("a red star")
        self.examples = {path.stem: json.loads(path.read_text()) for path in sorted(EXAMPLES.glob("*.json"))}
        self.classes = {name: describe(cls) for name, cls in available_nodes().items()}

    def attempt(self, random: Random) -> None:
        graph = self.graph(random)
        before = files_below(self.folder)
        (self.output / "taken").mkdir(parents=True)
        (self.output / "taken" / "x_00001_.png").write_bytes(b"earlier")
        (self.output / "link").symlink_to(self.folder)
        try:
            self.run(graph, random)
        finally:
            self.check_files(before)

    def run(self, graph: Any, random: Random) -> None:
        """Runs a graph as a value, as a file, or by the command, with assignments."""
        way = random.random()
        if way < 0.4:
            pictures = run_graph(graph, output_folder=self.output, partial=random.random() < 0.5).pictures
            for picture in pictures:
                check_picture(picture.path)
            return
        path = self.folder / "graph.json"
        try:
            path.write_text(json.dumps(graph), encoding="utf-8")
        except (RecursionError, TypeError):  # as text it is as deep as it was
            text = json.dumps(sane(graph))
            path.write_text(text.replace('"DEEP"', "[" * 3000 + "]" * 3000), encoding="utf-8")
        except ValueError:  # a number of thousands of digits
            path.write_text('{"1": {"class_type": "LoadImage", "inputs": {"image": 1%s}}}' % ("0" * 9000))
        try:
            if way < 0.7:
                run_graph(path, output_folder=self.output)
            else:
                self.by_command(path, random)
        finally:
            path.unlink()

    def by_command(self, path: Path, random: Random) -> None:
        arguments = ["run", str(path)]
        for _ in range(random.choice((0, 0, 0, 1, 2))):
            node = random.choice(
                ("7", "6", "5", "CascadePriorSampler", "SaveImage", "99", odd_text(random)[:200])
            )
            name = random.choice(
                ("steps", "width", "positive", "filename_prefix", "seed", "cfg", odd_text(random)[:200])
            )
            value = random.choice((odd_text(random)[:2000], "[1, 0]", '["8", 0]', "{", "1", "0.5"))
            arguments += ["--set", f"{node}.{name}={cheap(name, value)}"]
        for line in command(*arguments).splitlines():
            check_picture(Path(line.split("  ")[0]))

    def check_files(self, before: dict[str, tuple[int, int]]) -> None:
        """Asserts that nothing beyond the output folder has changed, and that nothing in it was lost or is
        half-written.
        """
        assert (self.output / "taken" / "x_00001_.png").read_bytes() == b"earlier", "an earlier file was lost"
        left = [path.name for path in self.output.rglob("*") if path.name.endswith(".part")]
        assert not left, f"left behind: {left}"
        (self.output / "link").unlink()
        shutil.rmtree(self.output)
        after = files_below(self.folder)
        changed = [name for name, status in before.items() if after.get(name) != status]
        assert not changed, f"lost or changed: {changed[:5]}"
        strange = [name for name in after.keys() - before.keys() if not name.startswith(TRAINED)]
        for name in after.keys() - before.keys():
            (self.folder / name).unlink()
        assert not strange, f"written outside the output folder: {strange[:5]}"

    def graph(self, random: Random) -> Any:
        graph = copy.deepcopy(random.choice(list(self.examples.values())))
        for node in graph.values():
            shrink(node["inputs"])
        if random.random() < 0.3:
            self.graft(graph, random)
        for _ in range(random.choice((0, 1, 1, 1, 2, 3, 6))):
            if isinstance(graph, dict) and graph:
                graph = random.choice(MUTATIONS)(graph, random, self)
        if isinstance(graph, dict):
            self.cap(graph)
        return graph

    def graft(self, graph: dict[str, Any], random: Random) -> None:
        """Adds a node of any class, its sockets linked to what fits, and saves the picture that it gives."""
        name = random.choice(list(self.classes))
        info = self.classes[name]
        if info.is_output and name.startswith("CascadeTrain") and random.random() < 0.7:
            return
        inputs: dict[str, Any] = {}
        for input_name, entry in info.inputs.items():
            sources = self.outputs_of(graph, entry.type)
            if sources:
                inputs[input_name] = random.choice(sources)
            elif "default" in entry.options:
                inputs[input_name] = entry.options["default"]
            elif entry.options.get("options"):
                inputs[input_name] = random.choice(entry.options["options"])
        inputs |= {"pictures": "pictures", "name": "trained"} if "pictures" in info.inputs else {}
        shrink(inputs)
        graph["50"] = {
            "class_type": name,
            "inputs": {key: inputs[key] for key in inputs if key in info.inputs},
        }
        for slot, kind in enumerate(info.outputs):
            if kind == "IMAGE":
                graph["51"] = {"class_type": "PreviewImage", "inputs": {"images": ["50", slot]}}
            elif self.users_of(graph, kind):
                node_id, input_name = random.choice(self.users_of(graph, kind))
                if node_id != "50":
                    graph[node_id]["inputs"][input_name] = ["50", slot]

    def outputs_of(self, graph: dict[str, Any], kind: str) -> list[list[Any]]:
        return [
            [node_id, slot]
            for node_id, node in graph.items()
            for slot, output in enumerate(self.classes[node["class_type"]].outputs)
            if output == kind
        ]

    def users_of(self, graph: dict[str, Any], kind: str) -> list[tuple[str, str]]:
        return [
            (node_id, name)
            for node_id, node in graph.items()
            for name, entry in self.classes[node["class_type"]].inputs.items()
            if entry.type == kind and name in node["inputs"]
        ]

    def cap(self, graph: dict[str, Any]) -> None:
        for node in graph.values():
            if isinstance(node, dict) and isinstance(node.get("inputs"), dict):
                info = self.classes.get(str(node.get("class_type")))
                for name, value in node["inputs"].items():
                    node["inputs"][name] = cheap(name, value, info.inputs.get(name) if info else None)
                if str(node.get("class_type")).startswith("CascadeTrain"):
                    for name, small in (("steps", 1), ("size", 64), ("batch_size", 1)):
                        node["inputs"].setdefault(name, small)


def shrink(inputs: dict[str, Any]) -> None:
    """The smallest sizes of a good graph's inputs."""
    for name, value in inputs.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            small = {"width": 64, "height": 64, "tile_size": 64, "feather": 8}.get(name, LARGEST.get(name))
            inputs[name] = value if small is None or value <= small else small


def cheap(name: str, value: Any, entry: Any = None) -> Any:
    """The value, or a smaller one where the schema allows that and it would cost minutes."""
    number: Any = value.get("__value__") if isinstance(value, dict) else value
    try:
        number = float(number)  # as the validation converts texts
    except (TypeError, ValueError, OverflowError):
        return value
    highest = entry.options.get("max", 1e30) if entry is not None else 1e30
    if name in LARGEST and LARGEST[name] < number <= highest:
        return LARGEST[name]
    if name in SMALLEST and 0 < number < SMALLEST[name]:
        return SMALLEST[name]
    return value


def sane(value: Any, depth: int = 0) -> Any:
    """The value as JSON can hold it, with a mark where it is too deep."""
    if depth > 20:
        return "DEEP"
    if isinstance(value, dict):
        return {str(key): sane(entry, depth + 1) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [sane(entry, depth + 1) for entry in value]
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 4000:
        return 10**300
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def check_picture(path: Path) -> None:
    with Image.open(path) as picture:
        picture.load()


def nodes_of(graph: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for node in graph.values():
        if isinstance(node, dict) and isinstance(node.get("inputs"), dict):
            yield node


def some_node(graph: dict[str, Any], random: Random) -> dict[str, Any]:
    return random.choice(list(nodes_of(graph)) or [{"inputs": {}}])


def some_input(node: dict[str, Any], random: Random) -> str:
    return random.choice(list(node["inputs"]) or ["x"])


def odd_input(graph: dict[str, Any], random: Random, world: World) -> Any:
    node = some_node(graph, random)
    node["inputs"][some_input(node, random)] = odd_value(random)
    return graph


def odd_number_input(graph: dict[str, Any], random: Random, world: World) -> Any:
    """A number where one was expected."""
    places = [
        (node, name)
        for node in nodes_of(graph)
        for name, value in node["inputs"].items()
        if isinstance(value, int | float)
    ]
    if places:
        node, name = random.choice(places)
        node["inputs"][name] = odd_number(random)
    return graph


def odd_string_input(graph: dict[str, Any], random: Random, world: World) -> Any:
    """A text where one was expected: a prompt, a file's name, a prefix, an option."""
    odd = {
        "positive": PROMPTS, "negative": PROMPTS, "filename_prefix": PREFIXES, "image": NAMES, "file": NAMES,
        "previewer": NAMES,
        "new_tokens": ("", "(", "a, b", "[loop]", "../x", "loop:vectors"), "pictures": ("pictures", "/", "/dev",
        "gone", "..", "fifo.png"),
    }  # fmt: skip
    places = [
        (node, name)
        for node in nodes_of(graph)
        for name, value in node["inputs"].items()
        if isinstance(value, str)
    ]
    if places:
        node, name = random.choice(places)
        node["inputs"][name] = (
            random.choice(odd.get(str(name), TEXTS)) if random.random() < 0.7 else odd_text(random)
        )
    return graph


def literal_on_socket(graph: dict[str, Any], random: Random, world: World) -> Any:
    links = [
        (node, name)
        for node in nodes_of(graph)
        for name, value in node["inputs"].items()
        if isinstance(value, list)
    ]
    if links:
        node, name = random.choice(links)
        node["inputs"][name] = random.choice(
            (odd_value(random), {"__value__": [1]}, {"samples": 1}, 0, "x", None)
        )
    return graph


def link_on_value(graph: dict[str, Any], random: Random, world: World) -> Any:
    node = some_node(graph, random)
    source = random.choice([*graph, "99", 7, None, "", -1, 1.5])
    slot = random.choice((0, 0, 1, 2, -1, 99, "0", None, 0.0, True, 10**30))
    node["inputs"][some_input(node, random)] = random.choice(
        ([source, slot], [source, slot], [source], [source, slot, 0], [[source, slot]])
    )
    return graph


def swap_links(graph: dict[str, Any], random: Random, world: World) -> Any:
    links = [
        (node, name)
        for node in nodes_of(graph)
        for name, value in node["inputs"].items()
        if isinstance(value, list)
    ]
    if len(links) > 1:
        (a, name_a), (b, name_b) = random.sample(links, 2)
        a["inputs"][name_a], b["inputs"][name_b] = b["inputs"][name_b], a["inputs"][name_a]
    return graph


def drop_node(graph: dict[str, Any], random: Random, world: World) -> Any:
    graph.pop(random.choice(list(graph)))
    return graph


def drop_input(graph: dict[str, Any], random: Random, world: World) -> Any:
    node = some_node(graph, random)
    node["inputs"].pop(some_input(node, random), None)
    return graph


def extra_input(graph: dict[str, Any], random: Random, world: World) -> Any:
    some_node(graph, random)["inputs"][odd_text(random)] = odd_value(random)
    return graph


def other_class(graph: dict[str, Any], random: Random, world: World) -> Any:
    some_node(graph, random)["class_type"] = random.choice(
        (*world.classes, odd_value(random), odd_text(random), "KSampler")
    )
    return graph


def other_shape(graph: dict[str, Any], random: Random, world: World) -> Any:
    """A node, its inputs, an id or the whole that is something else."""
    where = random.random()
    key = random.choice(list(graph))
    if where < 0.3:
        graph[key] = odd_value(random, 0.6)
    elif where < 0.6 and isinstance(graph[key], dict):
        graph[key][random.choice(("inputs", "_meta", "class_type", "is_changed"))] = odd_value(random, 0.6)
    elif where < 0.9:
        graph[odd_text(random)] = graph.pop(key)
    else:
        return random.choice(
            (odd_structure(random), odd_value(random), {"nodes": []}, {"prompt": graph}, list(graph.values()))
        )
    return graph


def many_nodes(graph: dict[str, Any], random: Random, world: World) -> Any:
    """A long chain, which no recursion follows, or many outputs."""
    length = random.choice((10, 300, 2000))
    chain = random.random() < 0.5
    for index in range(length):
        source = [f"c{index - 1}", 0] if index and chain else [random.choice(list(graph)), 0]
        inputs = {"image": source, "left": 8, "top": 0, "right": 0, "bottom": 0, "feather": 0}
        graph[f"c{index}"] = {"class_type": "CascadeOutpaint", "inputs": inputs}
    if random.random() < 0.5:
        graph["c0"]["inputs"]["image"] = [f"c{length - 1}", 0]  # a large circle
    graph["c"] = {"class_type": "PreviewImage", "inputs": {"images": [f"c{min(9, length - 1)}", 0]}}
    return graph


MUTATIONS = (
    odd_input, odd_input, odd_number_input, odd_number_input, odd_string_input, odd_string_input,
        odd_string_input, literal_on_socket,
    literal_on_socket, link_on_value, swap_links, drop_node, drop_input, extra_input, other_class, other_shape,
        many_nodes,
)  # fmt: skip
