"""Devices that are not NVIDIA's: which are chosen, in which precision, and what they never get."""

from typing import Any

import pytest
import torch
from torch import nn

from cascade_nodes.cascade_core import accelerators
from cascade_nodes.cascade_core.adapters import LowRank
from cascade_nodes.cascade_core.adapters.apply import Patch
from cascade_nodes.cascade_core.engine import card, graphs, operations, operations_on
from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.cascade_core.placement import PlainMemory, WeightConsumer, plain
from cascade_nodes.cascade_core.stages.device import ComputeDevice, chosen_device

AMD = torch.device("cuda", 0)


@pytest.fixture(params=["ROCm", "ZLUDA"])
def amd(request, monkeypatch):
    """An AMD card, which torch calls cuda."""
    name = "AMD Radeon RX 7900 XTX" + (" [ZLUDA]" if request.param == "ZLUDA" else "")
    monkeypatch.setattr(torch.version, "hip", "6.3.42131" if request.param == "ROCm" else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    # ROCm reports for an RX 7900 a capability as high as a 4090's, so the capability alone decides nothing.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (11, 0))
    card._card.cache_clear()
    yield
    card._card.cache_clear()


def test_amd_gets_nothing_of_nvidias(amd):
    assert card.card_of(AMD) is None
    assert all(operations_on(AMD, precision) is operations for precision in ("exact", "fp8", "int8"))
    assert not graphs.can_capture(AMD)
    assert not graphs.can_allocate_in_capture(AMD)
    device = ComputeDevice()
    assert device.device == AMD
    assert isinstance(device.pool, PlainMemory)
    assert device.weight_dtype("auto") == torch.bfloat16
    assert device.weight_dtype("fp8") == torch.bfloat16  # in which weights of 8 bits are multiplied


@pytest.mark.parametrize("kind", ["xpu", "mps", "privateuseone"])  # the last is DirectML's
@pytest.mark.parametrize("precision", ["exact", "fp8", "int8"])
def test_other_devices_compute_in_plain_pytorch(kind, precision):
    device = torch.device(kind, 0)
    assert operations_on(device, precision) is operations
    assert not operations.can_capture(device)
    assert not graphs.can_capture(device)
    assert not graphs.can_allocate_in_capture(device)


def available(monkeypatch, **counts: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(counts.get("cuda")))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: counts.get("cuda", 0))
    monkeypatch.setattr(torch.xpu, "is_available", lambda: bool(counts.get("xpu")))
    monkeypatch.setattr(torch.xpu, "device_count", lambda: counts.get("xpu", 0))
    monkeypatch.setattr(torch.xpu, "current_device", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(counts.get("mps")))


@pytest.mark.parametrize(
    ("there", "asked", "chosen"),
    [
        ({}, "auto", "cpu"),
        ({"mps": 1}, "auto", "mps:0"),
        ({"xpu": 2}, "auto", "xpu:0"),
        ({"xpu": 2}, "xpu:1", "xpu:1"),
        ({"mps": 1}, "cpu", "cpu"),
        ({"mps": 1}, torch.device("mps"), "mps:0"),
    ],
)
def test_the_device_that_is_chosen(monkeypatch, there, asked, chosen):
    available(monkeypatch, **there)
    assert chosen_device(asked) == torch.device(chosen)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ("mps", "device is mps, but torch finds no Apple GPU here; choose auto or cpu."),
        ("xpu", "device is xpu, but torch finds no Intel XPU here; choose auto or cpu."),
        ("privateuseone", "device is 'privateuseone'; choose auto, cpu, cuda, cuda:N, xpu, xpu:N or mps."),
    ],
)
def test_a_device_that_is_not_there(monkeypatch, asked, sentence):
    available(monkeypatch)
    with pytest.raises(CascadeError) as refused:
        chosen_device(asked)
    assert str(refused.value) == sentence


@pytest.mark.parametrize(("macos_14", "weights"), [(True, torch.bfloat16), (False, torch.float16)])
def test_precisions_on_apples(monkeypatch, macos_14, weights):
    available(monkeypatch, mps=1)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: macos_14)
    device = ComputeDevice()
    assert device.weight_dtype("auto") == weights
    assert device.picture_dtype() == torch.float32
    assert device.encoder_dtype() == torch.float16
    assert operations_on(device.device) is operations
    assert isinstance(device.pool, PlainMemory)
    with pytest.raises(CascadeError, match="Apple's devices have no fp8"):
        device.weight_dtype("fp8")


class Consumer(WeightConsumer):
    told = 0

    def offload(self) -> None:
        self.told += 1


class Free:
    """Says that so many bytes are free beside the networks that are on the meta device, of `total`."""

    def __init__(self, total: int):
        self.total, self.networks = total, []

    def __call__(self, device: torch.device) -> int:
        taken = sum(p.nbytes for n in self.networks for p in n.parameters() if p.device.type == "meta")
        return self.total - taken


@pytest.fixture
def three(monkeypatch):
    """Memory for two and a half of three networks of 100 floats."""
    free = Free(1000)
    free.networks = [nn.Linear(100, 1, bias=False).requires_grad_(False) for _ in range(3)]
    monkeypatch.setattr(plain, "free_bytes", free)
    return PlainMemory(torch.device("meta")), free.networks


def places(networks) -> list[str]:
    return [network.weight.device.type for network in networks]


def test_networks_leave_for_each_other(three):
    memory, networks = three
    weights, consumer = [network.weight for network in networks], Consumer()
    memory.run(networks[0], lambda device: None, consumer=consumer)
    memory.run(networks[1], lambda device: None)
    assert (places(networks), consumer.told) == (["meta", "meta", "cpu"], 0)
    assert memory.free_bytes(networks[2], keep_others=True) == -200
    assert memory.free_bytes(networks[2]) == 600
    memory.run(networks[2], lambda device: None)
    assert (places(networks), consumer.told) == (["cpu", "meta", "meta"], 1)
    memory.run(networks[1], lambda device: None)
    memory.run(networks[0], lambda device: None)
    assert places(networks) == ["meta", "meta", "cpu"]
    memory.release()
    assert all(network.weight is weight for network, weight in zip(networks, weights, strict=True))


def test_a_run_within_another_leaves_its_network(three):
    memory, (outer, *others) = three

    def body(device: torch.device) -> None:
        for other in others:
            memory.run(other, lambda device: None)
        assert outer.weight.device.type == "meta"

    memory.run(outer, body)


def test_out_of_memory_the_others_leave(three):
    memory, networks = three
    memory.run(networks[0], lambda device: None)
    said: list[str] = []

    def body(device: torch.device) -> list[str]:
        if networks[0].weight.device.type == "meta":
            raise RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)")
        return places(networks)

    assert memory.run(networks[1], body, notify=said.append) == ["cpu", "meta", "cpu"]
    assert said == ["out of memory; trying again with the other stages off the device."]

    def never(device: torch.device) -> None:
        raise torch.OutOfMemoryError("XPU out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        memory.run(networks[1], never)


def test_a_limit(three):
    memory, networks = three
    memory.limit = 500
    for network in networks:
        memory.run(network, lambda device: None)
    assert places(networks) == ["cpu", "cpu", "meta"]


def test_patches_are_applied_on_the_device(monkeypatch):
    monkeypatch.setattr(plain, "free_bytes", lambda device: None)
    network: Any = nn.Sequential(nn.Linear(4, 3)).requires_grad_(False)
    before = network[0].weight
    change: Any = LowRank(torch.randn(2, 4), torch.randn(3, 2))
    memory = PlainMemory(torch.device("cpu"))
    changed = memory.run(
        network, lambda device: network[0].weight.clone(), patches=[Patch("a", {"0": change})]
    )
    assert not torch.equal(changed, before)
    memory.release()
    assert network[0].weight is before


def test_a_device_that_says_nothing():
    meta = torch.device("meta")
    accelerators.synchronize(meta)
    accelerators.begin_peak(meta)
    accelerators.trim(meta)
    assert accelerators.free_bytes(meta) is None
    assert accelerators.peak_bytes(meta) == 0
    assert accelerators.device_name(meta) == "the device meta"
