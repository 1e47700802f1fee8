"""Patterns of filename prefixes, filled in as ComfyUI's canvas does before it queues a graph."""

import time

import pytest

from cascade_nodes.headless.patterns import fill_in_prefixes
from cascade_nodes.tests.headless.record_comfyui import node

FILLED_IN = {
    "%date:yyyy-MM-dd%/%CascadePriorSampler.seed%_x": "2026-03-07/11_x",
    "%date:yy.M.d_hh-mm-ss%": "26.3.7_09-05-01",
    "%date:h:m:s yyy%": "9:5:1 yyy",  # the canvas knows years of two and four digits
    "%date:%x": "x",
    "%My Sampler.steps%": "20",
    "%CascadePriorSampler.cfg%_%CascadePriorSampler.shift%": "3_1.5",
    "%CascadePriorSampler.engine%": "true",
    "%CascadeTextEncode.positive%": "a_b_ c_",
    "%width%x%height%_%batch_num%_%year%": "%width%x%height%_%batch_num%_%year%",  # SaveImage's own
    "%Nothing.seed%%CascadePriorSampler.nothing%": "%Nothing.seed%%CascadePriorSampler.nothing%",
    "%CascadePriorSampler.model%": "%CascadePriorSampler.model%",  # a link
    "%CascadePriorSampler.huge%": "%CascadePriorSampler.huge%",
    "100% %": "100% %",
    "plain": "plain",
}


@pytest.mark.parametrize(("prefix", "filled_in"), FILLED_IN.items())
def test_patterns(prefix, filled_in, monkeypatch):
    graph = {
        "1": node("CascadeTextEncode", positive="a/b: c?", negative=""),
        "2": node(
            *("CascadePriorSampler", "My Sampler"),
            seed=11,
            steps=20,
            cfg=3.0,
            shift=1.5,
            engine=True,
            model=["1", 0],
            huge=10**5000,
        ),
        "3": node("CascadePriorSampler", seed=12),
        "4": node("SaveImage", images=["1", 0], filename_prefix=prefix),
        "5": node("SaveImage", images=["1", 0], filename_prefix=["1", 0]),
        "6": node("SaveImage", images=["1", 0]),
    }
    monkeypatch.setattr(time, "localtime", lambda: time.struct_time((2026, 3, 7, 9, 5, 1, 5, 66, 0)))
    before = {node_id: dict(entry["inputs"]) for node_id, entry in graph.items()}
    filled = fill_in_prefixes(graph)
    assert filled["4"]["inputs"].pop("filename_prefix") == filled_in
    assert {node_id: entry["inputs"] for node_id, entry in graph.items()} == before


def test_a_value_written_many_times_stays_small():
    """A graph of 100 kB would have names of gigabytes."""
    graph = {"1": node("CascadeTextEncode", positive="x" * 50_000)}
    for number, count in enumerate((100, 1000), start=2):
        prefix = "%CascadeTextEncode.positive%" * count
        graph[str(number)] = node("SaveImage", images=["1", 0], filename_prefix=prefix)
    filled = [len(entry["inputs"].get("filename_prefix", "")) for entry in fill_in_prefixes(graph).values()]
    assert filled == [0, 100 * 201, 28_000]  # all of them too long to be saved, of which the user is told
