"""Order, outputs, errors, hidden values, reports."""

import pytest
import torch

from cascade_nodes.cascade_core.errors import Interrupted
from cascade_nodes.headless import Executor, run_graph
from cascade_nodes.headless.execution import NodeError
from cascade_nodes.headless.results import Observer
from cascade_nodes.headless.sentences import GraphError
from cascade_nodes.nodes.hosts import schema as io
from cascade_nodes.nodes.hosts.reporting import check_interrupted, report
from cascade_nodes.tests.headless.record_comfyui import node, number, show
from cascade_nodes.tests.headless.toy_graphs import JOIN, define, run
from cascade_nodes.tests.headless.toy_nodes import TOYS


def test_nodes_run_after_what_they_take_from(calls):
    result = run(JOIN)
    assert calls == ["ToyNumber", "ToyText", "ToyJoin", "ToyShow"]
    assert result.outputs == {"4": {"text": ["[6.0, 'cba']"], "shown_by": ["4"]}}
    assert list(result.timings) == ["1", "2", "3", "4"]
    assert 0 < sum(result.timings.values()) <= result.seconds


def test_an_output_is_chosen_by_its_index():
    graph = {
        "1": node("ToyText", text="a", mode="soft"),
        "2": node("ToyFlip", a=["1", 0]),
        "3": show(["2", 1]),
    }
    flip = define("ToyFlip", lambda cls, a: io.NodeOutput(a, a * 2), outputs=2)
    assert run(graph, flip=flip).outputs["3"]["text"] == ["'aa'"]


def test_only_what_an_output_needs_runs(calls):
    run(number(value=1) | {"3": node("ToyText", text="a", mode="soft")})
    assert calls == ["ToyNumber", "ToyShow"]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (KeyError("sigma"), "failed with KeyError: 'sigma' (--traceback shows where)."),
        (MemoryError(), "ran out of memory; try a smaller size or batch, or a smaller dtype."),
        (torch.OutOfMemoryError("x"), "ran out of memory; try a smaller size or batch, or a smaller dtype."),
        (
            FileNotFoundError(2, "No such file or directory", "a.txt"),
            "cannot use a.txt: No such file or directory; check that it exists and that you may use it.",
        ),
        (RuntimeError("two\n\tlines"), "failed with RuntimeError: two lines (--traceback shows where)."),
    ],
)
def test_any_failure_is_one_sentence_that_names_the_node(error, sentence):
    def fail(cls):
        raise error

    with pytest.raises(NodeError) as caught:
        run({"7": node("ToyFail"), "8": show(["7", 0])}, fail=define("ToyFail", fail, inputs=0))
    assert str(caught.value) == f"Node 7 (ToyFail) {sentence}"
    assert caught.value.__cause__ is error


def test_more_memory_than_there_is():
    hungry = define("ToyHungry", lambda cls: io.NodeOutput(torch.empty(2**60)), inputs=0)
    with pytest.raises(NodeError, match=r"^Node 7 \(ToyHungry\) ran out of memory; try a smaller size"):
        run({"7": node("ToyHungry"), "8": show(["7", 0])}, hungry=hungry)


def test_too_few_outputs_are_the_nodes_fault():
    with pytest.raises(NodeError, match=r"Node 1 \(ToyNone\) gave 0 outputs, but its schema has 1"):
        run({"1": node("ToyNone"), "2": show(["1", 0])}, none=define("ToyNone", lambda cls: None, inputs=0))


def test_a_tuple_will_do_as_output():
    graph = {"1": node("ToyTuple"), "2": show(["1", 0])}
    assert run(graph, tuple=define("ToyTuple", lambda cls: (5,), inputs=0)).outputs["2"]["text"] == ["5"]


def test_node_classes_hold_no_state():
    def remember(cls):
        cls.last = 1

    with pytest.raises(NodeError, match="Cannot modify class attribute 'last'"):
        run({"1": node("ToyState"), "2": show(["1", 0])}, state=define("ToyState", remember, inputs=0))


def test_nodes_run_without_gradients():
    mode = define("ToyMode", lambda cls: io.NodeOutput(torch.is_inference_mode_enabled()), inputs=0)
    assert run({"1": node("ToyMode"), "2": show(["1", 0])}, mode=mode).outputs["2"]["text"] == ["True"]


class Recorder(Observer):
    def __init__(self, stop_at=None):
        self.seen = []
        self.stop_at = stop_at

    def node_started(self, index, total, name):
        self.seen.append((index, total, name))

    def node_step(self, step, total, preview):
        self.seen.append((step, total))

    def node_reused(self, index, total, name):
        self.seen.append((index, total, name, "reused"))

    def node_finished(self, seconds):
        self.seen.append("finished")

    def interrupted(self):
        return self.seen[-1] == self.stop_at


def sampler(cls):
    for step in range(3):
        check_interrupted()
        report(step + 1, 3)
    return io.NodeOutput(0)


SAMPLER = define("ToySampler", sampler, inputs=0)
SAMPLE = {"1": node("ToySampler"), "2": show(["1", 0])}


def test_an_observer_sees_nodes_and_steps():
    recorder = Recorder()
    executor = Executor(recorder)
    run(SAMPLE, executor, sampler=SAMPLER)
    steps = [(1, 3), (2, 3), (3, 3)]
    assert recorder.seen == [(1, 2, "1 (ToySampler)"), *steps, "finished", (2, 2, "2 (ToyShow)"), "finished"]
    recorder.seen.clear()
    run(SAMPLE, executor, sampler=SAMPLER)
    assert recorder.seen == [(1, 1, "2 (ToyShow)", "reused")]


def test_an_observer_can_stop_a_run():
    recorder = Recorder(stop_at=(2, 3))
    with pytest.raises(Interrupted):
        run(SAMPLE, Executor(recorder), sampler=SAMPLER)
    assert recorder.seen[-1] == (2, 3)


def test_outside_a_run_reports_go_nowhere():
    check_interrupted()
    assert report(1, 2) is None


def test_partial_graphs_run_only_when_asked(calls):
    graph = number(value=1) | {"3": show(["9", 0])}
    with pytest.raises(GraphError, match="there is no node 9"):
        run(graph)
    assert calls == []
    result = run_graph(graph, nodes=TOYS, partial=True)
    assert list(result.outputs) == ["2"]
    assert list(result.node_errors) == ["3"]


def test_what_a_failing_node_says_is_one_line_cut_and_escaped():
    def fail(cls, a):
        raise RuntimeError("日本　" + "\x1b[2J\n" * 10_000)

    with pytest.raises(NodeError) as error:
        run(
            {"1": node("ToyNumber", value=1), "2": node("Fail", a=["1", 0]), "3": show(["2", 0])},
            Fail=define("Fail", fail),
        )
    message = str(error.value)
    assert message.startswith("Node 2 (Fail) failed with RuntimeError: 日本　\\x1b[2J \\x1b[2J ")
    assert len(message) < 4000
    assert "\x1b" not in message
