"""Every error against ComfyUI's own (comfyui.json, written by record_comfyui.py), and as a sentence."""

import json
from pathlib import Path

import pytest

from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.headless.sentences import GraphError, sentences
from cascade_nodes.headless.validation import validate
from cascade_nodes.tests.headless.record_comfyui import CYCLE, GRAPHS, canonical, node, number, show, text
from cascade_nodes.tests.headless.toy_nodes import TOYS, ToyShow

RECORD = json.loads((Path(__file__).parent / "comfyui.json").read_text())["validation"]


def errors_of(graph):
    """The errors of a graph by node, as (type, input)."""
    node_errors = validate(graph, TOYS).node_errors
    return {
        node_id: [(error["type"], error["extra_info"].get("input_name")) for error in entry["errors"]]
        for node_id, entry in node_errors.items()
    }


def said(graph):
    validation = validate(graph, TOYS)
    return str(GraphError(validation.error, validation.node_errors, TOYS)).splitlines()


def test_the_record_covers_every_graph_and_every_error_type():
    assert RECORD.keys() == GRAPHS.keys()
    types = {
        error["type"]
        for entry in RECORD.values()
        for node_error in entry["node_errors"].values()
        for error in node_error["errors"]
    }
    types |= {entry["error"]["type"] for entry in RECORD.values() if entry["error"]}
    assert types == {
        "required_input_missing", "bad_linked_input", "return_type_mismatch", "invalid_input_type",
        "value_smaller_than_min", "value_bigger_than_max", "value_not_in_list", "custom_validation_failed",
        "exception_during_inner_validation", "dependency_cycle", "prompt_no_outputs",
        "prompt_outputs_failed_validation", "missing_node_type",
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in GRAPHS if name != "a float for a whole number"])
def test_same_verdict_as_comfyui(name):
    record = RECORD[name]
    graph = json.loads(json.dumps(GRAPHS[name]))
    assert graph == record["graph"]
    validation = validate(graph, TOYS)
    entry = {"error": validation.error, "outputs": validation.outputs, "node_errors": validation.node_errors}
    entry = canonical(json.loads(json.dumps(entry)))
    assert entry == {key: record[key] for key in entry}
    assert graph == record["graph"], "the caller's graph is left as it was"
    if not validation.node_errors and not validation.error:
        assert {node_id: node["inputs"] for node_id, node in validation.graph.items()} == record["converted"]


def test_an_error_of_an_output_node_itself_names_the_exception_plainly():
    class Touchy(ToyShow):
        @classmethod
        def validate_inputs(cls, toy):
            raise RuntimeError("no")

    validation = validate(number(value=1), {**TOYS, "ToyShow": Touchy})
    (error,) = validation.node_errors["2"]["errors"]
    assert (error["type"], error["details"]) == ("exception_during_validation", "no")
    assert error["extra_info"]["exception_type"] == "RuntimeError"
    assert sentences(validation.error, validation.node_errors) == [
        "Node 2 (ToyShow): checking its inputs failed with RuntimeError: no."
    ]


@pytest.mark.parametrize("link", [["9", 0], ["1", 1], ["1", -1], ["1", "0"], ["1", True], [1, 0]])
def test_a_link_to_nothing_is_a_bad_link(link):
    assert errors_of({"1": node("ToyNumber", value=1), "2": show(link)}) == {
        "2": [("bad_linked_input", "toy")]
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "nan", "-inf"])
def test_a_float_must_be_finite(value):
    assert errors_of(number(value=1, scale=value)) == {"1": [("invalid_input_type", "scale")]}


def test_a_whole_number_is_whole_and_a_truth_is_true_or_false():
    """ComfyUI takes 2.9 for 2, as its record says, and "false" for true."""
    assert RECORD["a float for a whole number"]["node_errors"] == {}
    assert said(number(value=2.9)) == [
        "Node 1 (ToyNumber): input 'value' is 2.9, but it takes a whole number (INT)."
    ]
    assert validate(number(value=20.0), TOYS).graph["1"]["inputs"]["value"] == 20
    flips = {"False": False, "true": True, 0: False, 1: True}
    for value, expected in flips.items():
        graph = {"1": node("ToyText", text="a", mode="hard", flip=value), "2": show(["1", 0])}
        assert validate(graph, TOYS).graph["1"]["inputs"]["flip"] is expected
    graph = {"1": node("ToyText", text="a", mode="hard", flip="no"), "2": show(["1", 0])}
    assert said(graph) == ["Node 1 (ToyText): input 'flip' is 'no', but it takes true or false (BOOLEAN)."]


def test_infinity_is_no_whole_number():
    assert errors_of(number(value=float("inf"))) == {"1": [("invalid_input_type", "value")]}


def test_outputs_that_depend_on_an_error_are_named_and_the_others_run():
    graph = number(value=101) | {"3": node("ToyNumber", value=1), "4": show(["3", 0]), "5": show(["1", 0])}
    validation = validate(graph, TOYS)
    assert validation.error is None
    assert validation.outputs == ["4"]
    assert validation.node_errors["1"]["dependent_outputs"] == ["2", "5"]


def test_two_cycles_are_both_found():
    graph = CYCLE | {"3": node("ToyJoin", left=["3", 0], right=["1", 0]), "4": show(["3", 0])}
    assert errors_of(graph) == {node_id: [("dependency_cycle", None)] for node_id in "123"}
    assert len(said(graph)) == 2


def test_a_long_chain_does_not_exhaust_the_stack():
    graph = {"0": node("ToyNumber", value=1)}
    graph |= {str(i): node("ToyJoin", left=[str(i - 1), 0]) for i in range(1, 3000)}
    assert validate(graph | {"show": show(["2999", 0])}, TOYS).outputs == ["show"]


@pytest.mark.parametrize(
    ("graph", "sentence"),
    [
        (
            number(),
            "Node 1 (ToyNumber): the required input 'value' is missing; give it a value or connect it.",
        ),
        (number(value=-1), "Node 1 (ToyNumber): input 'value' is -1, but it must be between 0 and 100."),
        (number(value=101), "Node 1 (ToyNumber): input 'value' is 101, but it must be between 0 and 100."),
        (number(value="many"), "Node 1 (ToyNumber): input 'value' is 'many', but it takes a whole number (INT)."),
        (
            text(text="", mode="rough"),
            "Node 1 (ToyText): input 'mode' is 'rough', but it must be one of: soft, hard.",
        ),
        (
            text(text="", mode="soft", many="x"),
            "Node 1 (ToyText): input 'many' is 'x', but it must be "
            "one of: a long list (see `cascade nodes`).",
        ),
        (
            {"1": node("ToyImage"), "2": show(["1", 0])},
            "Node 2 (ToyShow): input 'toy' is connected to output 0 of node 1, "
            "which gives IMAGE, but it takes TOY.",
        ),
        (
            {"1": node("ToyNumber", value=1), "2": show(["1"])},
            "Node 2 (ToyShow): input 'toy' is connected to ['1'], but a link is [node id, output index].",
        ),
        (
            {"2": show(["1", 0])},
            "Node 2 (ToyShow): input 'toy' is connected to ['1', 0], but there is no node 1 in the graph.",
        ),
        (
            CYCLE | {"3": show(["1", 0])},
            "The graph runs in a circle, 1 (ToyJoin) -> 2 (ToyJoin) -> 1 (ToyJoin); "
            "take out one of these connections.",
        ),
        (
            {"1": node("ToyNomber")},
            "Node 1: there is no node 'ToyNomber'; did you mean ToyNumber? Else run with --server, on a ComfyUI that "
            "has it.",
        ),
        (
            {"1": node("Xyz")},
            "Node 1: there is no node 'Xyz'; run with --server, on a ComfyUI that has it, or see `cascade nodes`.",
        ),
        (
            {"1": {"inputs": {}}},
            "Node 1 has no class_type, which must name a node (`cascade nodes` lists them).",
        ),
        (
            {"1": node("ToyNumber", value=1)},
            "The graph has no output node such as SaveImage, so there is nothing to make.",
        ),
        (GRAPHS["exception_during_inner_validation"],
         "Node 1 (ToyPair): checking its inputs failed with KeyError: 'unlucky'."),
    ],
)  # fmt: skip
def test_each_error_is_one_sentence(graph, sentence):
    assert said(graph) == [sentence]


def test_a_custom_error_is_said_in_the_nodes_own_words():
    assert said(GRAPHS["custom_validation_failed"]) == ["Node 1 (ToyPair): inputs 'a', 'b': 1 + 2 is odd."]


def test_the_older_nodes_of_a_server_have_their_options_as_type():
    extra = {"input_name": "crop", "input_config": [["disabled", "center"], {}], "received_value": "zz"}
    error = {"type": "value_not_in_list", "message": "Value not in list", "details": "", "extra_info": extra}
    assert sentences(None, {"4": {"class_type": "ImageScale", "errors": [error]}}) == [
        "Node 4 (ImageScale): input 'crop' is 'zz', but it must be one of: disabled, center."
    ]


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        ([], "holds a list"),
        ("text", "holds a text"),
        (None, "holds null"),
        (3, "holds a number"),
        ({}, "holds no nodes"),
        ({"nodes": [], "links": []}, "Export (API)"),
        ({"1": []}, "node 1 is a list"),
        ({"1": {"class_type": "ToyNumber"}}, 'node 1 has no "inputs"'),
        ({"1": {"class_type": "ToyNumber", "inputs": [1]}}, 'node 1 has no "inputs"'),
    ],
)
def test_what_is_no_graph_is_refused(graph, words):
    with pytest.raises(CascadeError) as caught:
        validate(graph, TOYS)
    assert words in str(caught.value)
