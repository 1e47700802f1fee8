"""Graphs of toy nodes, and nodes made of one function."""

from cascade_nodes.headless import run_graph
from cascade_nodes.nodes.hosts import schema as io
from cascade_nodes.tests.headless.record_comfyui import node, show
from cascade_nodes.tests.headless.toy_nodes import TOYS

JOIN = {
    "4": show(["3", 0]),
    "3": node("ToyJoin", left=["1", 0], right=["2", 0]),
    "2": node("ToyText", text="abc", mode="hard", flip=True),
    "1": node("ToyNumber", value=3, scale=2.0),
}


def define(name, execute, outputs=1, inputs=1, **more):
    """A toy node made of one function of the inputs a, b, …"""
    ids = "abc"[:inputs]

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=name,
            inputs=[io.Custom("TOY").Input(entry) for entry in ids],
            outputs=[io.Custom("TOY").Output() for _ in range(outputs)],
        )

    return type(
        name, (io.ComfyNode,), {"define_schema": define_schema, "execute": classmethod(execute), **more}
    )


def run(graph, executor=None, **more):
    return run_graph(graph, nodes={**TOYS, **{cls.__name__: cls for cls in more.values()}}, executor=executor)
