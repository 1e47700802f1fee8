"""The engine with weights that placement moves: streamed block by block, offloaded and back, changed by LoRAs."""

from typing import Any

import pytest
import torch

from cascade_nodes.cascade_core import StageB, StageC
from cascade_nodes.cascade_core.adapters import LowRank
from cascade_nodes.cascade_core.adapters.apply import Patch, patched
from cascade_nodes.cascade_core.engine import Engine, operations, workspace
from cascade_nodes.cascade_core.engine import engine as engine_module
from cascade_nodes.cascade_core.engine import graphs as graphs_module
from cascade_nodes.cascade_core.networks.fp16 import STREAM_SCALE, scale_residual_stream
from cascade_nodes.cascade_core.networks.precision import cast_on_the_way
from cascade_nodes.cascade_core.placement import DeviceMemory
from cascade_nodes.tests.core.placements import Counting, Late
from cascade_nodes.tests.engine.test_engine import (
    STAGE_B,
    STAGE_C,
    TOLERANCE,
    UNUSUAL,
    assert_same,
    build,
    stage_b_inputs,
    stage_c_inputs,
)

NETWORKS = [
    (StageC, STAGE_C, stage_c_inputs),
    (StageC, UNUSUAL, stage_c_inputs),
    (StageB, STAGE_B, stage_b_inputs),
]
# Copies as early, and as late, as they may come.
DEVICES = pytest.mark.parametrize("device_class", [Counting, Late])


def size_of(network) -> int:
    return sum(parameter.nbytes for parameter in network.parameters())


def network_outputs(network, calls: list[tuple[Any, dict, float]]) -> list[Any]:
    with torch.inference_mode():
        return [network(x, torch.full((len(x),), r), **conditions) for x, conditions, r in calls]


def engine_outputs(
    pool: DeviceMemory, engine: Engine, calls: list[tuple[Any, dict, float]], **options: Any
) -> list[Any]:
    """The engine's outputs in one run, in which the network itself must not be called."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("The network was called instead of the engine.")

    network: Any = engine.network
    network.forward = refuse
    try:
        with torch.inference_mode():
            return pool.run(
                network,
                lambda _: [engine(x, torch.full((len(x),), r), **conditions) for x, conditions, r in calls],
                consumer=engine,
                **options,
            )
    finally:
        del network.forward


def assert_close(results: list[Any], expected: list[Any]) -> None:
    for result, right in zip(results, expected, strict=True):
        assert (result - right).abs().max() <= TOLERANCE * right.abs().max()


@DEVICES
# Bytes of a unit: each block alone, few together, several.
@pytest.mark.parametrize(("unit", "share"), [(1, 0.8), (1, 0.35), (60_000, 0.7), (150_000, 0.7)])
@pytest.mark.parametrize(("network_class", "config", "inputs"), NETWORKS)
def test_as_the_network(network_class, config, inputs, unit, share, device_class):
    network = build(network_class, config)
    engine = Engine(network, join=True)
    first, other = inputs(config), inputs(config)
    calls = [
        (*first, 0.7),
        (*first, 0.7),
        (*first, 0.2),
        (*other, 0.2),
        (*first, 0.7),
        (*inputs(config, batch=1), 0.1),
    ]
    expected = network_outputs(network, calls)
    pool = DeviceMemory(device_class(int(share * size_of(network))), unit)
    for _ in range(2):
        assert_close(engine_outputs(pool, engine, calls), expected)
        assert pool.resident_share(network) < 1
    assert_same(network, engine, *first)  # where it lies now, in main memory


@DEVICES
@pytest.mark.parametrize("share", [1.5, 0.6])
def test_weights_that_are_cast_on_their_way(share, device_class):
    """The engine runs from bf16 in main memory, resident and streamed, as on weights that were cast before."""
    network = build(StageC, STAGE_C).bfloat16()
    whole = build(StageC, STAGE_C).bfloat16().float()
    calls = [(*stage_c_inputs(STAGE_C), r) for r in (0.7, 0.2)]
    expected = network_outputs(whole, calls)
    engine = Engine(network, join=True)
    cast_on_the_way(network, torch.float32)
    pool = DeviceMemory(device_class(int(share * size_of(whole))), 1)
    for _ in range(2):
        assert_close(engine_outputs(pool, engine, calls), expected)
    pool.release()
    assert {parameter.dtype for parameter in network.parameters()} >= {torch.bfloat16}


@DEVICES
@pytest.mark.parametrize("scale", [1.0, STREAM_SCALE])  # of the residual stream, as fp16 holds it
def test_controlnets_and_further_conditions(device_class, scale):
    network = build(StageC, STAGE_C)
    scale_residual_stream(network, scale)
    x, conditions = stage_c_inputs(STAGE_C)
    control = [torch.randn(2, 64, 4, 5), None, torch.randn(2, 64, 2, 2)]
    more = {"sca": torch.full((2,), 0.3), "crp": torch.full((2,), 0.9)}
    calls = [
        (x, {**conditions, "control": control}, 0.7),
        (x, {**conditions, **more}, 0.7),
        (x, conditions, 0.7),
    ]
    pool = DeviceMemory(device_class(int(0.6 * size_of(network))), 1)
    assert_close(engine_outputs(pool, Engine(network), calls), network_outputs(network, calls))


@DEVICES
@pytest.mark.parametrize("share", [1.5, 0.6])
def test_loras(device_class, share):
    network = build(StageC, STAGE_C)
    engine, calls = Engine(network), [(*stage_c_inputs(STAGE_C), 0.7)] * 2
    names = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    changes = {}
    for name in names[:: len(names) // 12]:
        rows, columns = network.get_submodule(name).weight.shape
        changes[name] = LowRank(torch.randn(2, columns), torch.randn(rows, 2))
    patch = Patch("a LoRA", changes, 0.3)
    plain = network_outputs(network, calls)
    with patched(network, [patch]):
        changed = network_outputs(network, calls)
    pool = DeviceMemory(device_class(int(share * size_of(network))), 1)
    for patches, expected in (([], plain), ([patch], changed), ([patch], changed), ([], plain)):
        assert_close(engine_outputs(pool, engine, calls, patches=patches), expected)


def test_a_forward_that_is_broken_off_leaves_nothing_half_made(monkeypatch):
    network = build(StageC, STAGE_C)
    engine, calls = Engine(network), [(*stage_c_inputs(STAGE_C), 0.7)]
    expected = network_outputs(network, calls)
    pool = DeviceMemory(Late(int(0.6 * size_of(network))), 1)
    real, left = operations.attention, [3]

    def attention(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(operations, "attention", attention)

    def body(_: Any) -> list[Any]:
        ((x, conditions, r),) = calls
        with pytest.raises(KeyboardInterrupt):
            engine(x, torch.full((len(x),), r), **conditions)
        return [engine(x, torch.full((len(x),), r), **conditions) for _ in range(2)]

    assert_close(pool.run(network, body, consumer=engine), expected * 2)


def test_what_it_cannot_do_streamed_the_network_does():
    network = build(StageC, STAGE_C)
    x, conditions = stage_c_inputs(STAGE_C)
    noise = torch.tensor([0.2, 0.8])  # another for each image
    engine, pool = Engine(network), DeviceMemory(Late(int(0.6 * size_of(network))), 1)
    with torch.inference_mode():
        expected = network(x, noise, **conditions)
        assert torch.equal(
            pool.run(network, lambda _: engine(x, noise, **conditions), consumer=engine), expected
        )
        block = network.down_blocks[0][0]
        hook = block.register_forward_hook(lambda module, args, out: out * 2)
        noise = torch.full((2,), 0.5)
        expected = network(x, noise, **conditions)
        assert torch.equal(
            pool.run(network, lambda _: engine(x, noise, **conditions), consumer=engine), expected
        )
        hook.remove()


def test_weights_that_come_back_are_recognised(monkeypatch):
    """Nothing is derived anew from the same values, wherever they lie."""
    network, other = build(StageC, STAGE_C), build(StageB, STAGE_B)
    calls = [(*stage_c_inputs(STAGE_C), 0.7)]
    expected, bindings = network_outputs(network, calls), []
    real = engine_module.BoundUNet
    monkeypatch.setattr(engine_module, "BoundUNet", lambda *arguments: bindings.append(1) or real(*arguments))
    device = Counting(int(1.05 * size_of(network)))
    pool, engine = DeviceMemory(device, 1), Engine(network)
    for _ in range(3):
        for device.size in (int(1.05 * size_of(network)), int(0.6 * size_of(network))):
            assert_close(engine_outputs(pool, engine, calls), expected)
            pool.run(other, lambda _: None)
            assert pool.resident_share(network) < 1
    assert bindings == [1]
    assert_same(network, engine, *calls[0][:2])


class Captured:
    """Stands in for a captured CUDA graph: counts its replays, or fails as it is captured."""

    captures: list[Any]
    error: Exception | None = None

    def __init__(self, forward: Any, x: Any, plan: Any, memory: Any):
        self.captures.append(self)
        if self.error is not None:
            raise self.error
        self.forward, self.plan, self.memory, self.replays = forward, plan, memory, 0

    def __call__(self, x: Any) -> Any:
        self.replays += 1
        with workspace.within(self.plan, self.memory):
            return self.forward(x).clone()


@pytest.fixture
def graphs(monkeypatch):
    monkeypatch.setattr(operations, "can_capture", lambda device: True)
    monkeypatch.setattr(graphs_module, "CapturedForward", Captured)
    monkeypatch.setattr(Captured, "captures", [], raising=False)
    return Captured.captures


def replays(graphs: list[Captured]) -> list[int]:
    return [graph.replays for graph in graphs]


def test_graphs_are_captured_anew_where_weights_come_back_to(graphs):
    network, other = build(StageC, STAGE_C), build(StageB, STAGE_B)
    calls = [(*stage_c_inputs(STAGE_C), r) for r in (0.7, 0.5, 0.7)]
    expected = network_outputs(network, calls)
    pool, engine = DeviceMemory(Counting(int(1.05 * size_of(network))), 1), Engine(network)
    for counts in ([2], [2, 3]):  # the first forward is eager; what it takes is known when weights come back
        assert_close(engine_outputs(pool, engine, calls), expected)
        assert replays(graphs) == counts
        pool.run(other, lambda _: None)
    pool.device.size = int(0.6 * size_of(network))  # pyright: ignore[reportAttributeAccessIssue]
    assert_close(engine_outputs(pool, engine, calls), expected)
    assert replays(graphs) == [2, 3]  # none where weights are streamed


@DEVICES
def test_graphs_outlive_weights_that_make_way(graphs, device_class):
    networks = [build(StageC, STAGE_C), build(StageC, STAGE_C), build(StageB, STAGE_B)]
    inputs = [stage_c_inputs(STAGE_C), stage_c_inputs(STAGE_C), stage_b_inputs(STAGE_B)]
    calls = [[(*each, r) for r in (0.7, 0.5)] for each in inputs]
    engines = [Engine(network) for network in networks]
    pool = DeviceMemory(device_class(int(0.8 * sum(map(size_of, networks)))), 60_000)
    rounds, counts, homes = [], [], []
    for _ in range(5):
        rounds.append(
            [engine_outputs(pool, engine, each) for engine, each in zip(engines, calls, strict=True)]
        )
        counts.append(len(graphs))
        homes.append([id(unit.reserved_buffer) for each in pool.placements.values() for unit in each.units])
        assert any(pool.resident_share(network) < 1 for network in networks)
    assert counts[2] == counts[3] == counts[4]
    assert homes[2] == homes[3] == homes[4]
    assert len({id(engine.shared_workspace()) for engine in engines}) == 1
    for outputs in rounds[1:]:
        for results, first in zip(outputs, rounds[0], strict=True):
            assert all(torch.equal(result, right) for result, right in zip(results, first, strict=True))
    for network, results, each in zip(networks, rounds[-1], calls, strict=True):
        assert_close(results, network_outputs(network, each))
    pool.release()
    assert pool.device.now == 0  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("error", "warnings"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), []),
        (
            RuntimeError("CUDA error: operation not permitted\nwhen stream is capturing"),
            [
                "No CUDA graph could be captured (RuntimeError: CUDA error: operation not permitted): forwards take "
                "longer."
            ],
        ),
    ],
    ids=["no memory", "refused"],
)
def test_without_a_graph_where_none_can_be_captured(error, warnings, graphs, monkeypatch, caplog):
    network = build(StageC, STAGE_C)
    calls = [(*stage_c_inputs(STAGE_C), r) for r in (0.7, 0.5, 0.7)]
    monkeypatch.setattr(Captured, "error", error)
    messages: list[str] = []
    results = engine_outputs(
        DeviceMemory(Counting(2 * size_of(network)), 1), Engine(network), calls, notify=messages.append
    )
    assert_close(results, network_outputs(network, calls))
    assert (len(graphs), messages, caplog.messages) == (1, [], warnings)


@DEVICES
def test_slots_lie_in_the_workspace_of_graphs_that_cannot_run(graphs, device_class):
    network, other = build(StageC, STAGE_C), build(StageB, STAGE_B)
    x, conditions = stage_c_inputs(STAGE_C, size=(40, 40))
    calls, others = [(x, conditions, 0.7), (x, conditions, 0.5)], [(*stage_b_inputs(STAGE_B), 0.3)]
    engine, streamed = Engine(network), Engine(other)
    pool = DeviceMemory(device_class(10 * size_of(network)), 1)
    first = engine_outputs(pool, engine, calls)
    workspace = engine.shared_workspace()
    assert workspace is not None
    device: Any = pool.device
    device.size = size_of(network) + engine.cache_bytes(device.device) + workspace.nbytes + 10_000
    slots: list[Any] = []
    real = pool._borrowed_slots
    pool._borrowed_slots = lambda *given: slots.append(real(*given)) or slots[-1]  # type: ignore[method-assign]
    assert_close(engine_outputs(pool, streamed, others, single_use=True), network_outputs(other, others))
    assert slots[-1] is workspace
    again = engine_outputs(pool, engine, calls)
    assert replays(graphs) == [3]  # the same graph
    assert_close(again, first)


def test_memory_of_graphs_is_counted_while_they_live(graphs):
    network, other = build(StageC, STAGE_C), build(StageB, STAGE_B)
    calls = [(*stage_c_inputs(STAGE_C), r) for r in (0.7, 0.5)]
    engine, cpu = Engine(network), torch.device("cpu")
    engine_outputs(DeviceMemory(Counting(2 * size_of(network)), 1), engine, calls)
    memory, known = engine.shared_workspace(), engine.known_bytes(calls[0][0].shape)
    assert memory is not None
    assert memory is graphs[0].memory
    assert memory.nbytes >= graphs[0].plan.size > 0
    assert engine.cache_bytes(cpu) > 0  # keys and values
    assert known == (graphs[0].plan.size, engine.cache_bytes(cpu))
    assert engine.known_bytes((1, 2, 3)) is None
    assert engine.graph_bytes(torch.device("cuda", 0)) == Engine(other).graph_bytes(cpu) == 0
    engine.offload()
    assert engine.cache_bytes(cpu) == 0
    assert engine.shared_workspace() is None
    assert engine.known_bytes(calls[0][0].shape) == known
