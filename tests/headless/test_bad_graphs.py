"""Graphs as files and as values that no node was made for: one sentence before anything runs, at a bounded cost."""

import json
import os
from functools import reduce

import pytest

from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.headless import graph as graph_module
from cascade_nodes.headless.cli import main
from cascade_nodes.headless.graph import DEEPEST
from cascade_nodes.headless.node_checks import check_node
from cascade_nodes.headless.registry import available_nodes, describe
from cascade_nodes.headless.run import run_graph
from cascade_nodes.headless.sentences import GraphError
from cascade_nodes.headless.sources import read_source
from cascade_nodes.headless.validation import validate
from cascade_nodes.nodes.hosts import schema as io
from cascade_nodes.tests.headless.record_comfyui import node, show
from cascade_nodes.tests.headless.toy_graphs import define, run
from cascade_nodes.tests.headless.toy_nodes import TOYS

SMALL = {"1": node("ToyNumber", value=3), "2": show(["1", 0])}
ANSI = "\x1b[2J\r\x07"
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


def refused(graph, **more):
    with pytest.raises(CascadeError) as caught:
        run_graph(graph, nodes=TOYS, **more)
    message = str(caught.value)
    assert all(line.isprintable() and len(line) < 2500 for line in message.splitlines())
    return message


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_graphs_are_read_in_every_unicode_encoding(encoding, tmp_path):
    (tmp_path / "graph.json").write_text(
        json.dumps(SMALL | {"é": node("ToyCount")}, ensure_ascii=False), encoding
    )
    source = read_source(tmp_path / "graph.json", lambda class_type: None)
    assert source.graph["é"] == node("ToyCount")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not valid JSON: Expecting value at line 1, column 1"),
        (b"\xef\xbb\xbf", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"\x00" * 9, "is not a text file"),
        ('"café"'.encode("latin-1"), "is not a text file"),
        (b'{"1": {"inputs": {"value": %s}}}' % (b"9" * 5000), "holds a number of too many digits"),
        (b'{"1":' * 100_000, "is nested too deeply"),
        (b'{"1": {"inputs": {"value": %s1%s}}}' % (b"[" * 300, b"]" * 300), "is nested too deeply"),
        (b'{"1": {"inputs": {}, "_meta": %s1%s}}' % (b'{"a":' * 300, b"}" * 300), "is nested too deeply"),
        (b'{"1": {"inputs": {}}, "\\u001b[2J": 3}', r"node '\x1b[2J' is a number"),
    ],
    ids=range(10),
)
def test_files_that_are_not_graphs(content, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "graph.json").write_bytes(content)
    message = refused("graph.json")
    assert message.startswith(("graph.json ", "graph.json: "))
    assert words in message


def test_what_is_not_a_file(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path / "pipe", "it is a pipe or a device, not a file"),
        (tmp_path, "it is a folder"),
        ("/dev/zero", "it is a pipe or a device, not a file"),
        ("a\0b", "its name holds characters that no file's name has"),
        ("x" * 5000, "File name too long"),
        (f"{tmp_path}/{ANSI}", "No such file or directory"),
    ):
        message = refused(path)
        assert message.startswith("Cannot read the graph ")
        assert message.endswith(f": {reason}.")


def test_a_file_far_too_large_is_not_read(tmp_path):
    with open(tmp_path / "graph.json", "wb") as file:
        file.truncate(graph_module.LARGEST_FILE + 1)
    assert refused(tmp_path / "graph.json").endswith("is larger than 64 MiB, so it is not taken for a graph.")


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        ([], "holds a list, but a graph is an object"),
        (None, "holds null, but a graph is an object"),
        (3, "holds a number, but a graph is an object"),
        ({"1": node("ToyNumber", value=10**5000)}, "holds a number of 16,610 bits; no input takes one"),
        ({1: node("ToyNumber")}, "a node has the id 1, but an id is a text"),
        ({"1": node("ToyNumber", value={1, 2})}, "holds {1, 2}, which is not a value that JSON has"),
        ({"1": node("ToyNumber", value={"a": {2: b"x"}})}, "holds b'x', which is not a value that JSON has"),
        (
            {"1": node("ToyNumber", value=reduce(lambda inner, _: [inner], range(DEEPEST), 0))},
            "is nested too deeply",
        ),
    ],
)
def test_values_that_json_does_not_have(graph, words):
    assert words in refused(graph)


def test_values_within_each_other_many_times_over_cost_little():
    doubled = reduce(lambda inner, _: [inner, inner], range(40), 0)
    assert "but it takes a whole number (INT)" in refused(
        {"1": node("ToyNumber", value={"__value__": doubled}), "2": show(["1", 0])}
    )
    circle: list = []
    circle.append(circle)
    assert "is nested too deeply" in refused({"1": node("ToyNumber", value=circle)})


@pytest.mark.parametrize(
    "literal", [0, 1.5, "x", True, {}, {"a": 1}, None, {"__value__": [1]}, [], ["1"], [1, 0], ["1", 0, 0]]
)
def test_a_value_on_a_socket_is_refused_before_anything_runs(literal):
    """Every node of ours is asked; for sockets that may be left out, null means that they are."""
    classes = available_nodes()
    sockets = [
        (name, entry_id)
        for name, cls in classes.items()
        for entry_id, entry in describe(cls).inputs.items()
        if entry.type not in WIDGETS and (literal is not None or entry.required)
    ]
    assert len(sockets) > 30
    for name, entry_id in sockets:
        errors = check_node(
            "1", {"1": {"class_type": name, "inputs": {entry_id: literal}}}, {name: describe(classes[name])}
        ).errors
        (error,) = (error for error in errors if error["extra_info"]["input_name"] == entry_id
                    and error["type"] != "required_input_missing")  # fmt: skip
        assert error["type"] == ("bad_linked_input" if isinstance(literal, list) else "value_on_socket")


def test_the_sentence_of_a_value_on_a_socket():
    assert (
        refused({"1": show(3)})
        == "Node 1 (ToyShow): input 'toy' is 3, but it takes a connection that gives TOY; connect one."
    )
    assert refused({"1": show({"samples": "x" * 10**6})}).startswith(
        "Node 1 (ToyShow): input 'toy' is {'samples': 'xxx"
    )
    assert refused({"1": show([1, 2, 3])}) == (
        "Node 1 (ToyShow): input 'toy' is connected to [1, 2, 3], but a link is [node id, output index]."
    )


def test_a_socket_that_may_be_left_out_may_be_null(calls):
    run({"1": node("ToyNumber", value=1), "2": node("ToyShow", toy=["1", 0], image=None)})
    assert calls == ["ToyNumber", "ToyShow"]


@pytest.mark.parametrize(
    "value",
    [10**300, -(2**64), "9" * 5000, 1e400, float("nan"), "x" * 10**6, ANSI, "\ud800", None, {}],
    ids=range(10),
)
def test_odd_numbers(value):
    for name in ("value", "scale"):
        message = refused({"1": node("ToyNumber", **{"value": 1, name: value}), "2": show(["1", 0])})
        assert message.startswith(f"Node 1 (ToyNumber): input '{name}' is ")


def test_names_and_values_of_a_graph_never_reach_the_terminal_as_they_are(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    good = {"2": node("LoadImage", image="in.png"), ANSI: node("PreviewImage", images=["2", 0])}
    for graph, assignment in (
        (
            {
                ANSI: node("LoadImage", image=ANSI),
                "2": node("SaveImage", images=[ANSI, 0], filename_prefix="a"),
            },
            "2.filename_prefix=x",
        ),
        ({ANSI: node(ANSI, ANSI)}, f"{ANSI}.x=1"),
        ({"1": node("SaveImage", images=[ANSI, 0], filename_prefix=ANSI)}, f"1.{ANSI}=1"),
        ({"1": node("SaveImage", **{ANSI: ANSI})}, ANSI),
        ({"1": {"inputs": {}, "class_type": {ANSI: 1}}}, "1.x=1"),
        (good, f"2.image={ANSI}"),
        (good, "2.image=\udce9"),
    ):
        (tmp_path / "graph.json").write_text(json.dumps(graph))
        for arguments in ([], ["--set", assignment]):
            assert main(["run", "graph.json", *arguments]) == 1
            out, err = capfd.readouterr()
            assert out == ""
            assert err.startswith("error: ")
            assert all(line.isprintable() and len(line) < 2500 for line in err.splitlines())
            assert "report" not in err


LONG = 10_000


def passing(a, b):
    return node("Pass", a=[a, 0], b=[b, 0])


def test_a_long_chain_and_a_ladder_with_more_paths_than_atoms_run_each_node_once():
    """As many paths lead to the end of the ladder as there are subsets of its 500 steps."""
    ran = []

    def execute(cls, a, b):
        ran.append(cls.hidden)
        return io.NodeOutput(a)

    step = define("Pass", execute, inputs=2)
    for length in (3000, 500):
        graph = {"0": node("ToyNumber", value=1)}
        graph |= {str(i): passing(str(i - 1), str(i - 1) if length == 500 else "0") for i in range(1, length)}
        ran.clear()
        result = run(graph | {"show": show([str(length - 1), 0])}, Pass=step)
        assert result.outputs["show"]["text"] == ["1.0"]
        assert len(ran) == length - 1


def test_a_chain_of_ten_thousand_nodes_is_checked():
    graph = {"0": node("ToyNumber", value=1)}
    graph |= {str(i): node("ToyJoin", left=[str(i - 1), 0]) for i in range(1, LONG)}
    assert validate(graph | {"show": show([str(LONG - 1), 0])}, TOYS).outputs == ["show"]


def test_a_long_circle_with_many_short_ones_in_it_is_told_briefly():
    count = 3000
    graph = {str(i): node("ToyJoin", left=[str((i + 1) % count), 0], right=["0", 0]) for i in range(count)}
    (line,) = refused(graph | {"show": show(["0", 0])}).splitlines()
    assert line.startswith("The graph runs in a circle, 0 (ToyJoin) -> 1 (ToyJoin) -> ")
    assert line.endswith(
        "-> 9 (ToyJoin) -> … 2,990 more … -> 0 (ToyJoin); take out one of these connections."
    )


def test_many_faults_and_many_outputs_are_told_in_twenty_lines():
    count = 3000
    graph = {str(i): node("ToyJoin", left=[str(i + 1), 0], count=0) for i in range(count)}
    graph[str(count)] = node("ToyNumber", value=1)
    graph |= {f"show {i}": show(["0", 0]) for i in range(count)}
    with pytest.raises(GraphError) as caught:
        run_graph(graph, nodes=TOYS)
    assert str(caught.value).splitlines()[-1] == "There are more faults; mend these first."
    assert len(caught.value.node_errors["0"]["dependent_outputs"]) == count
