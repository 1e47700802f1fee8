"""Networks that do not fit together on a card: their weights make way for each other, and no CUDA graph is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cascade_nodes.cascade_core.engine import Engine, graphs, operations_on
from cascade_nodes.cascade_core.engine import cuda as kernels
from cascade_nodes.cascade_core.placement import CudaDevice, DeviceMemory
from cascade_nodes.tests.gpu.compared import SHALLOW_B, SHALLOW_C, inputs, network_of, same_bits

pytestmark = pytest.mark.usefixtures("exact_arithmetic")


class Small(CudaDevice):
    """A card of `size` bytes for weights, graphs and runs."""

    def __init__(self, device: torch.device, size: int):
        super().__init__(device)
        self.size = size

    def budget(self, resident_bytes: int) -> int:
        return self.size


def test_graphs_survive_weights_that_make_way(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    if operations_on(device) is not kernels:
        pytest.skip("the kernels need compute capability 8.0")
    captures: list[Any] = []
    real = graphs.CapturedForward
    monkeypatch.setattr(graphs, "CapturedForward", lambda *given: captures.append(given) or real(*given))
    configs = [SHALLOW_C, SHALLOW_C, SHALLOW_B]
    sizes = [(9, 11), (9, 11), (34, 50)]
    networks: list[Any] = [network_of(config, torch.bfloat16, torch.device("cpu")) for config in configs]
    calls = []
    for config, network, size in zip(configs, networks, sizes, strict=True):
        x, conditions = inputs(config, network, size=size)
        calls.append((x.to(device), {name: value.to(device) for name, value in conditions.items()}))

    def pictures(pool: DeviceMemory, count: int) -> list[list[Tensor]]:
        engines = [Engine(network) for network in networks]
        rounds = []
        for _ in range(count):
            outputs: list[Tensor] = []
            for engine, (x, conditions) in zip(engines, calls, strict=True):
                r = torch.full((len(x),), 0.4)
                body = lambda _, engine=engine, x=x, conditions=conditions, r=r: [  # noqa: E731
                    engine(x, r, **conditions) for _ in range(3)
                ]
                outputs += pool.run(engine.network, body, consumer=engine)[1:]  # type: ignore[arg-type]
            rounds.append(outputs)
            counts.append(len(captures))
        pool.release()
        return rounds

    counts: list[int] = []
    with torch.inference_mode():
        (expected,) = pictures(DeviceMemory(CudaDevice(device)), 1)
        weights = sum(parameter.nbytes for network in networks for parameter in network.parameters())
        counts.clear()
        rounds = pictures(DeviceMemory(Small(device, int(0.85 * weights)), 2 << 20), 6)
    assert counts[3] == counts[-1], counts  # until then each may move to the largest workspace
    for outputs in rounds:
        assert same_bits(outputs, expected)
