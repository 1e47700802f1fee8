"""What runs again, what is reused, and what is let go."""

import gc
import weakref

import pytest

from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.headless import Executor
from cascade_nodes.headless.execution import NodeError
from cascade_nodes.nodes.hosts import schema as io
from cascade_nodes.tests.headless.record_comfyui import node, number, show
from cascade_nodes.tests.headless.toy_graphs import JOIN, define, run


@pytest.fixture
def executor():
    return Executor()


def test_the_same_inputs_run_once_in_one_graph(calls):
    twice = {
        "1": node("ToyNumber", value=1),
        "2": node("ToyNumber", value="1"),
        "5": node("ToyNumber", value=2),
    }
    twice |= {"3": node("ToyJoin", left=["1", 0], right=["2", 0]), "4": show(["3", 0]), "6": show(["5", 0])}
    result = run(twice)
    assert calls.count("ToyNumber") == 2
    assert result.outputs["4"]["text"] == ["[1.0, 1.0]"]
    assert result.outputs["6"]["text"] == ["2.0"]


def test_a_second_run_reuses_everything(calls, executor):
    first = run(JOIN, executor)
    calls.clear()
    second = run(JOIN, executor)
    assert calls == []
    assert second.outputs == first.outputs
    assert second.timings == {}


def test_a_change_runs_what_depends_on_it_and_nothing_else(calls, executor):
    run(JOIN, executor)
    calls.clear()
    result = run(JOIN | {"2": node("ToyText", text="xyz", mode="hard")}, executor)
    assert calls == ["ToyText", "ToyJoin", "ToyShow"]
    assert result.outputs["4"]["text"] == ["[6.0, 'xyz']"]


def test_what_the_last_graph_did_not_have_is_forgotten(calls, executor):
    run(JOIN, executor)
    run(number(value=1), executor)
    calls.clear()
    run(JOIN, executor)
    assert calls == ["ToyNumber", "ToyText", "ToyJoin", "ToyShow"]


def test_without_an_executor_nothing_is_kept(calls):
    run(JOIN)
    run(JOIN)
    assert len(calls) == 8


def test_a_changed_file_runs_again_and_an_unchanged_one_does_not(calls, executor, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("one")
    graph = {"1": node("ToyFile", path=str(file)), "2": show(["1", 0])}
    run(graph, executor)
    assert run(graph, executor).outputs["2"]["text"] == ["'one'"]
    assert calls == ["ToyFile", "ToyShow"]
    file.write_text("two")
    assert run(graph, executor).outputs["2"]["text"] == ["'two'"]
    assert calls == ["ToyFile", "ToyShow"] * 2


def test_nan_as_a_fingerprint_means_always(executor):
    runs = []
    always = define(
        "ToyAlways",
        lambda cls: runs.append(1) or io.NodeOutput(0),
        inputs=0,
        fingerprint_inputs=classmethod(lambda cls: float("nan")),
    )
    graph = {"1": node("ToyAlways"), "2": show(["1", 0])}
    run(graph, executor, always=always)
    run(graph, executor, always=always)
    assert len(runs) == 2


def test_fingerprints_see_connected_inputs_as_none(executor):
    seen = []
    spy = define(
        "ToySpy",
        lambda cls, a: io.NodeOutput(a),
        fingerprint_inputs=classmethod(lambda cls, a: seen.append(a)),
    )
    run({"1": node("ToyNumber", value=1), "2": node("ToySpy", a=["1", 0]), "3": show(["2", 0])}, spy=spy)
    assert seen == [None]


def test_nodes_that_are_not_idempotent_or_know_their_id_share_nothing(calls):
    graph = {"1": node("ToyImage"), "2": node("ToyImage"), "3": node("ToyNumber", value=1)}
    graph |= {
        "4": node("ToyShow", toy=["3", 0], image=["1", 0]),
        "5": node("ToyShow", toy=["3", 0], image=["2", 0]),
    }
    graph |= {"6": show(["3", 0]), "7": show(["3", 0])}
    result = run(graph)
    assert calls.count("ToyImage") == 2
    assert [result.outputs[node_id]["shown_by"] for node_id in "4567"] == [["4"], ["5"], ["6"], ["7"]]


class Model:
    """Something large."""


def chain_with_a_model():
    """load -> use -> look, where `look` says whether the model is still in memory."""
    models = []

    def load(cls):
        model = Model()
        models.append(weakref.ref(model))
        return io.NodeOutput(model)

    def look(cls, a):
        gc.collect()
        return io.NodeOutput(models[0]() is not None)

    nodes = {
        "load": define("ToyLoad", load, inputs=0),
        "use": define("ToyUse", lambda cls, a: io.NodeOutput("used")),
        "look": define("ToyLook", look),
    }
    graph = {"1": node("ToyLoad"), "2": node("ToyUse", a=["1", 0]), "3": node("ToyLook", a=["2", 0])}
    return graph | {"4": show(["3", 0])}, nodes


def test_a_single_run_lets_go_of_a_model_after_its_last_use():
    graph, nodes = chain_with_a_model()
    assert run(graph, **nodes).outputs["4"]["text"] == ["False"]


def test_a_model_that_is_used_again_later_stays():
    graph, nodes = chain_with_a_model()
    two_inputs = define("ToyBoth", lambda cls, a, b: io.NodeOutput(isinstance(a, Model)), inputs=2)
    graph |= {"5": node("ToyBoth", a=["1", 0], b=["3", 0]), "6": show(["5", 0])}
    result = run(graph, both=two_inputs, **nodes)
    assert result.outputs["4"]["text"] == ["True"]
    assert result.outputs["6"]["text"] == ["True"]


def test_an_executor_that_keeps_holds_the_model(executor):
    graph, nodes = chain_with_a_model()
    assert run(graph, executor, **nodes).outputs["4"]["text"] == ["True"]


def test_after_a_failure_what_was_done_is_not_done_again(calls, executor):
    broken = []

    def work(cls, a):
        if not broken:
            broken.append(1)
            raise CascadeError("the disk is full.")
        return io.NodeOutput(a)

    graph = number(value=1) | {"3": node("ToyWork", a=["1", 0]), "2": show(["3", 0])}
    fragile = define("ToyWork", work)
    with pytest.raises(NodeError) as caught:
        run(graph, executor, fragile=fragile)
    assert str(caught.value) == "Node 3 (ToyWork): the disk is full."
    assert calls == ["ToyNumber"]
    run(graph, executor, fragile=fragile)
    assert calls == ["ToyNumber", "ToyShow"]
