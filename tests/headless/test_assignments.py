import copy

import pytest

from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.headless.assignments import assign
from cascade_nodes.tests.headless.record_comfyui import node, show

GRAPH = {
    "1": node("ToyText", "Prompt", text="a", mode="soft"),
    "2": node("ToyNumber", "Twice", value=1),
    "3": node("ToyNumber", "Twice", value=2),
    "ToyText": show(["1", 0]),
    "a.b": node("ToyJoin", left=["1", 0]),
}
TYPES = {
    "ToyText": {"text": "STRING", "mode": "COMBO", "flip": "BOOLEAN"},
    "ToyNumber": {"value": "INT", "scale": "FLOAT"},
    "ToyJoin": {"left": "TOY"},
}


def assigned(*assignments):
    """The inputs that differ from GRAPH's."""
    graph = assign(GRAPH, assignments, TYPES.get)
    return {
        node_id: {
            name: value
            for name, value in node["inputs"].items()
            if GRAPH[node_id]["inputs"].get(name) != value
        }
        for node_id, node in graph.items()
        if node != GRAPH[node_id]
    }


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("2.value=20", {"2": {"value": 20}}),
        ("2.scale=0.5", {"2": {"scale": 0.5}}),
        ("1.flip=true", {"1": {"flip": True}}),
        ("1.flip=False", {"1": {"flip": False}}),
        ("2.value=20.0", {"2": {"value": 20}}),
        ("Prompt.mode=hard", {"1": {"mode": "hard"}}),
        ("ToyJoin.left=[\"2\", 0]", {"a.b": {"left": ["2", 0]}}),
        ("a.b.left=[\"2\", 0]", {"a.b": {"left": ["2", 0]}}),
        ("ToyText.toy=5", {"ToyText": {"toy": 5}}),  # an id goes before a class
        ("1.text=a red star = good", {"1": {"text": "a red star = good"}}),
        ("1.text=\"quoted\"", {"1": {"text": "quoted"}}),
        ("1.text=1.50", {"1": {"text": "1.50"}}),
        ("1.text=true", {"1": {"text": "true"}}),
        ("1.text=", {"1": {"text": ""}}),
        ("2.value=many", {"2": {"value": "many"}}),  # the validation will say what is wrong
        (f"2.value={'1' * 5000}", {"2": {"value": "1" * 5000}}),  # more digits than Python reads
        (f"1.text={'[' * 100_000}", {"1": {"text": "[" * 100_000}}),  # deeper than Python reads
    ],
)  # fmt: skip
def test_values(assignment, expected):
    assert assigned(assignment) == expected


def test_the_last_of_several_wins_and_the_graph_is_left_alone():
    before = copy.deepcopy(GRAPH)
    assert assigned("2.value=3", "2.value=4", "3.value=5") == {"2": {"value": 4}, "3": {"value": 5}}
    assert before == GRAPH


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("2.value", "--set '2.value' is not NODE.INPUT=VALUE, such as 3.steps=20."),
        ("value=3", "--set 'value=3' is not NODE.INPUT=VALUE, such as 3.steps=20."),
        (".value=3", "--set '.value=3' is not NODE.INPUT=VALUE, such as 3.steps=20."),
        ("2.=3", "--set '2.=3' is not NODE.INPUT=VALUE, such as 3.steps=20."),
        ("2.steps=3", "Node 2 (ToyNumber) has no input 'steps'; its inputs: value, scale."),
        ("ToyNumber.value=3", "Several nodes are called 'ToyNumber' (ids 2, 3); name one by its id."),
        ("Twice.value=3", "Several nodes are called 'Twice' (ids 2, 3); name one by its id."),
        ("2.value=1.5", "--set '2.value=1.5': 1.5 is not a whole number; give one such as 20."),
        ("1.flip=no", "--set '1.flip=no': 'no' is neither true nor false; give true or false."),
        (
            "9.value=3",
            "The graph has no node '9' (id, class or title); its nodes: "
            "1 (ToyText), 2 (ToyNumber), 3 (ToyNumber), ToyText (ToyShow), a.b (ToyJoin).",
        ),
    ],
)
def test_mistakes(assignment, message):
    with pytest.raises(CascadeError) as caught:
        assigned(assignment)
    assert str(caught.value) == message


def test_a_seed_is_a_whole_number():
    graph = {"1": node("KSampler", seed=1)}
    assert assign(graph, ["seed=7.0"], {}.get)["1"]["inputs"]["seed"] == 7
    with pytest.raises(CascadeError, match=r"--set 'seed=1\.5': 1\.5 is not a whole number"):
        assign(graph, ["seed=1.5"], {}.get)
