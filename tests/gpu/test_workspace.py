"""Captured forwards on a card take no memory of the allocator, whichever it is, and give it back when they go.

To be run with both: `pytest tests/gpu`, and the same with PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync.
"""

from __future__ import annotations

import ctypes
import gc
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from cascade_nodes.cascade_core.engine import Engine, graphs, operations_on, vqgan
from cascade_nodes.cascade_core.engine import cuda as kernels
from cascade_nodes.tests.gpu.compared import (
    SHALLOW_B,
    SHALLOW_C,
    STAGE_A,
    draw,
    inputs,
    network_of,
    runs,
    same_bits,
)
from cascade_nodes.tests.gpu.conftest import Replays

pytestmark = pytest.mark.usefixtures("exact_arithmetic")

MEM_ALLOC, MEM_FREE = 10, 11  # CUgraphNodeType


@pytest.fixture(autouse=True, scope="module")
def fused(device: torch.device) -> None:
    if operations_on(device) is not kernels:
        pytest.skip("the kernels need compute capability 8.0")


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All graphs that are captured, each with its nodes still to be looked at."""
    captured: list[Any] = []
    make = partial(torch.cuda.CUDAGraph, keep_graph=True)

    def keep() -> Any:
        captured.append(make())
        return captured[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", keep)
    return captured


def node_types(graph: Any) -> list[int]:
    driver = ctypes.CDLL("libcuda.so.1")
    raw, count = ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t()
    assert driver.cuGraphGetNodes(raw, None, ctypes.byref(count)) == 0
    nodes = (ctypes.c_void_p * count.value)()
    assert driver.cuGraphGetNodes(raw, nodes, ctypes.byref(count)) == 0
    kinds = []
    for node in nodes:
        kind = ctypes.c_int()
        assert driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)) == 0
        kinds.append(kind.value)
    return kinds


def decoded(engine: Any, latent: Tensor, count: int = 3) -> list[Tensor]:
    return [engine(latent) for _ in range(count)]


def stages(device: torch.device) -> dict[str, Any]:
    """A function of each stage that runs it three times."""
    stage_a = network_of(STAGE_A, torch.bfloat16, device)
    latent = draw((1, 4, 17, 23), next(stage_a.parameters()))
    calls: dict[str, Any] = {"A": partial(decoded, vqgan.DecoderEngine(stage_a), latent)}
    for name, config, size in (("B", SHALLOW_B, (34, 50)), ("C", SHALLOW_C, (9, 11))):
        network = network_of(config, torch.bfloat16, device)
        calls[name] = partial(runs, Engine(network), *inputs(config, network, size=size))
    return calls


@pytest.mark.parametrize("stage", ["A", "B", "C"])
def test_a_graph_holds_no_allocation(stage: str, device: torch.device, kept: list[Any]):
    first, *others = stages(device)[stage]()
    assert torch.equal(*others)
    assert (first - others[0]).norm() <= 0.02 * first.norm()
    (graph,) = kept
    kinds = node_types(graph)
    assert len(kinds) > 20
    assert not {MEM_ALLOC, MEM_FREE} & set(kinds)


def test_the_counter_sees_a_hidden_value(device: torch.device):
    """By which a forward that allocates is known before it is captured."""
    x, w, b = (
        torch.randn(*shape, device=device, dtype=torch.bfloat16)
        for shape in ((2048, 256), (512, 256), (512,))
    )
    out = torch.empty(2048, 512, device=device, dtype=torch.bfloat16)
    with torch.inference_mode():
        run = partial(torch.addmm, b, x, w.T, out=out)
        run()
        assert not graphs.allocates(run, device)
        assert graphs.allocates(lambda: torch.nn.functional.linear(x, w, b), device)


def test_a_forward_that_allocates_is_captured_by_pytorchs_allocator_alone(
    device: torch.device, replays: Replays, caplog: pytest.LogCaptureFixture
):
    hidden = torch.randn(512, 512, device=device)
    graphed = graphs.Graphed(graphs.GraphMemory())
    with torch.inference_mode():
        results = [graphed(lambda x: (x @ hidden).add_(1), hidden) for _ in range(4)]
    assert same_bits(results[1:], 3 * results[:1])
    native = graphs.can_allocate_in_capture(device)
    assert replays.count == (3 if native else 0)
    assert [record.message for record in caplog.records] == (
        []
        if native
        else [
            "A forward of (512, 512) allocates memory as it runs. It runs without a CUDA graph, which takes longer."
        ]
    )


def run_stages(device: torch.device) -> None:
    """Within a function, so that no stage is left. One that was left lay elsewhere each time."""
    for run in stages(device).values():
        run()


def test_memory_is_level_over_captures_that_come_and_go(device: torch.device, replays: Replays):
    levels = []
    for _ in range(6):
        run_stages(device)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        levels.append((torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)))
    assert replays.count == 6 * 3 * 2
    assert len({allocated for allocated, _ in levels[2:]}) == 1, levels
    assert levels[-1][1] <= levels[2][1], levels


def test_a_graph_survives_what_a_host_does_between_two_runs(device: torch.device):
    for run in stages(device).values():
        before = run()[1:]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        rubbish = [torch.full((1000, 1000 + 17 * i), torch.nan, device=device) for i in range(20)]
        assert same_bits(run()[1:], before)
        del rubbish
