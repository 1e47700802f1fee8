"""Placements: what a network gives is bit for bit the same in all of them, in no more memory than there is."""

import gc
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cascade_nodes.cascade_core import CascadeError, StageB, StageC
from cascade_nodes.cascade_core.adapters import Change, LowRank
from cascade_nodes.cascade_core.adapters.apply import Patch, patched
from cascade_nodes.cascade_core.adapters.changes import Difference
from cascade_nodes.cascade_core.checkpoints import load_model, write_safetensors
from cascade_nodes.cascade_core.networks.precision import compute_dtype
from cascade_nodes.cascade_core.placement import (
    CudaDevice,
    DeviceMemory,
    SimulatedDevice,
    WeightConsumer,
    out_of_memory,
    parse_bytes,
)
from cascade_nodes.cascade_core.placement import device as placement_device
from cascade_nodes.cascade_core.placement import units as placement_units
from cascade_nodes.cascade_core.placement.device import KERNELS, MARGIN, WORKSPACE
from cascade_nodes.cascade_core.placement.plan import plan_streaming
from cascade_nodes.cascade_core.placement.units import Unit, split_into_units
from cascade_nodes.cascade_core.text.encoder import build_text_model
from cascade_nodes.tests.core.placements import Counting, Late
from cascade_nodes.tests.nodes.tiny import CONFIGS, TEXT_WIDTH, TRANSFORMER, shake

UNIT = 40_000  # bytes
BLOCKS = {"blocks": [[2, 4], [4, 2]]}
MORE = {"stage_c": BLOCKS, "stage_b": {**BLOCKS, "block_repeat": [[1, 2], [3, 2]]}}
Forward = Callable[[], Tensor]


def network(kind: str) -> tuple[nn.Module, Forward]:
    """A network of some twenty units, and a forward of it."""
    torch.manual_seed(3)
    if kind == "text":
        config = {**TRANSFORMER, "num_hidden_layers": 12, "hidden_size": 64, "intermediate_size": 96}
        text = (
            build_text_model({**config, "projection_dim": 64, "vocab_size": 80}).eval().requires_grad_(False)
        )
        ids = torch.randint(0, 78, (2, 77))
        ids[:, -1] = 79
        return text, lambda: text(input_ids=ids, attention_mask=torch.ones(2, 77).long()).text_embeds
    cls: Any = {"stage_c": StageC, "stage_b": StageB}[kind]
    unet = cls.from_config(CONFIGS[kind] | MORE[kind]).eval().requires_grad_(False)
    shake(unet)
    x, r = torch.randn(2, unet.config.c_in, 16, 16), torch.rand(2)
    if kind == "stage_b":
        conditions = {"effnet": torch.randn(2, 16, 4, 4), "clip": torch.randn(2, 1, TEXT_WIDTH)}
    else:
        conditions = {
            "clip_text": torch.randn(2, 7, TEXT_WIDTH),
            "clip_text_pooled": torch.randn(2, 1, TEXT_WIDTH),
        }
        conditions["clip_img"] = torch.randn(2, 1, 48)
    return unet, lambda: unet(x, r, **conditions)


def size_of(net: nn.Module) -> int:
    return sum(unit.size for unit in split_into_units(net, UNIT)[0])


def values(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(net: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def lora(net: nn.Module) -> Patch:
    """Changes of every attention's query and output, of a layer in no block, and of their biases and the norms."""
    generator = torch.Generator().manual_seed(5)
    layers = [
        name for name, _ in net.named_modules() if name.endswith(("to_q", "out_proj", "clip_txt_mapper"))
    ]
    modules: dict[str, Any] = {name: net.get_submodule(name) for name in layers}
    shapes: dict[str, Any] = {name: module.weight.shape for name, module in modules.items()}
    changes: dict[str, Change] = {
        name: LowRank(torch.randn(2, i, generator=generator), torch.randn(o, 2, generator=generator))
        for name, (o, i) in shapes.items()
    }
    vectors = {
        n: p for n, p in net.named_parameters() if n.endswith(("out_proj.bias", "mapper.bias", "gamma"))
    }
    for name, parameter in vectors.items():
        changes[name] = Difference(torch.randn(parameter.numel(), generator=generator))
    return Patch("some.safetensors", changes, 0.3)


@pytest.mark.parametrize("device_class", [Counting, Late])
@pytest.mark.parametrize("share", [1.5, 0.9, 0.7, 0.5, 0.35])
@pytest.mark.parametrize("kind", ["stage_c", "stage_b", "text"])
@torch.inference_mode()
def test_bit_for_bit_in_no_more_memory_than_there_is(kind, share, device_class):
    net, forward = network(kind)
    expected, before = forward(), values(net)
    device = device_class(int(share * size_of(net)))
    memory = DeviceMemory(device, UNIT)
    for _ in range(2):  # from where it was loaded; from where the first run has left it
        results = memory.run(net, lambda _: [forward() for _ in range(3)])
        assert all(torch.equal(result, expected) for result in results)
    assert (memory.resident_share(net) == 1) == (share > 1)
    assert device.peak <= device.size
    largest = max(unit.size for unit in split_into_units(net, UNIT)[0])
    assert device.peak > min(device.size, size_of(net)) - largest  # and uses what there is
    memory.release()
    assert device.now == 0
    assert same(net, before)


class Watched(Counting):
    """Knows what the computation used last and when, and refuses a copy that would not wait for it."""

    def __init__(self, size: int):
        super().__init__(size)
        self.time = self.checked = 0
        self.used: dict[int, int] = {}  # address -> time

    def record_event(self) -> int:
        self.time += 1
        return self.time

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        start = target.data_ptr()
        for address, time in self.used.items():
            if start <= address < start + len(target):
                assert after is not None
                assert after > time
                self.checked += 1
        return super().copy(target, source, after)

    def watch(self, net: nn.Module) -> None:
        for module in net.modules():
            module.register_forward_hook(self._note)

    def _note(self, module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            self.used[parameter.data_ptr()] = self.time


@pytest.mark.parametrize("kind", ["stage_c", "stage_b", "text"])
@torch.inference_mode()
def test_no_copy_comes_into_memory_that_is_in_use(kind):
    net, forward = network(kind)
    device = Watched(int(0.6 * size_of(net)))
    device.watch(net)
    memory = DeviceMemory(device, UNIT)
    for _ in range(2):
        memory.run(net, lambda _: [forward(), forward()])
    assert device.checked > 20


def test_what_stays_is_not_copied_again():
    net, forward = network("stage_c")
    device = Counting(2 * size_of(net))
    memory = DeviceMemory(device, UNIT)
    memory.run(net, lambda _: forward())
    first, addresses = device.copied, [p.data_ptr() for p in net.parameters()]
    memory.run(net, lambda _: forward())
    assert device.copied == first == size_of(net)
    assert [p.data_ptr() for p in net.parameters()] == addresses


def test_only_what_does_not_fit_is_streamed():
    net, forward = network("stage_c")
    order = split_into_units(net, UNIT)[1]
    total, slot = size_of(net), max(unit.size for unit in order)
    previous = 0
    for missing in (0.1, 0.3, 0.5, 0.7):
        device = Counting(int((1 - missing) * total))
        memory = DeviceMemory(device, UNIT)
        memory.run(net, lambda _: forward())
        here = device.copied
        memory.run(net, lambda _: [forward() for _ in range(10)])
        streamed = (device.copied - here) / 10
        assert missing * total + slot <= streamed <= missing * total + 4 * slot
        assert streamed > previous
        previous = streamed


def test_a_thread_that_has_read_keeps_no_memory_of_the_device():
    """A thread keeps its arguments until it gets the next ones: usually for a moment, here for ever."""

    class Readers:
        def __init__(self) -> None:
            self.kept: list[Any] = []

        def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
            self.kept.append(arguments)
            future: Future = Future()
            future.set_result(function(*arguments))
            return future

    loader = DeviceMemory(device := Counting(10**6), UNIT).loader
    loader.__dict__["_readers"] = Readers()
    unit = split_into_units(network("stage_c")[0], UNIT)[0][0]
    target = device.empty(unit.size)
    transfer = loader.fetch(unit, target, None, repeated=False)
    del target
    transfer.wait()
    assert device.copied == unit.size
    assert device.now == 0


def test_streamed_units_are_spread_and_repeated_ones_stay():
    units = [Unit([nn.Linear(32, 32)], [torch.zeros(1024)]) for _ in range(12)]
    rest = Unit([], [torch.zeros(64)])
    plan = plan_streaming([rest, *units], units, free_bytes=rest.size + 8 * 4096)
    assert (plan.slots, plan.slot_bytes) == (2, 4096)
    assert [unit in plan.streamed for unit in units] == [False, True] * 6  # four do not fit, two are slots
    repeated = [*units[:6] * 3, *units[6:]]
    plan = plan_streaming([rest, *units], repeated, free_bytes=rest.size + 8 * 4096)
    assert plan.streamed == set(units[6:])
    assert plan_streaming([rest, *units], units, free_bytes=rest.size + 12 * 4096).streamed == frozenset()
    assert plan_streaming([rest, *units], units, free_bytes=0).streamed == set(units)
    large = Unit([nn.Linear(32, 32)], [torch.zeros(2048)])
    plan = plan_streaming(
        [rest, *units, large], [*units[:6], large, *units[6:]], free_bytes=rest.size + 8 * 4096
    )
    assert (plan.slot_bytes, large in plan.streamed) == (4096, False)
    plan = plan_streaming([rest, *units, large], [*units[:6], large, *units[6:]], free_bytes=rest.size)
    assert (plan.slot_bytes, large in plan.streamed) == (8192, True)


@pytest.mark.parametrize("share", [1.5, 0.5])
@torch.inference_mode()
def test_lora_in_every_placement(share):
    net, forward = network("stage_c")
    plain, before, patch = forward(), values(net), lora(net)
    with patched(net, [patch]):
        changed = forward()
    assert not torch.equal(changed, plain)
    device = Late(int(share * size_of(net)))
    memory = DeviceMemory(device, UNIT)
    parameters = dict(net.named_parameters())
    for patches, right in (
        ([], plain),
        ([patch], changed),
        ([patch], changed),
        ([], plain),
        ([patch], changed),
    ):
        results = memory.run(net, lambda _: [forward(), forward()], patches=patches)
        assert all(torch.equal(result, right) for result in results)
        assert device.peak <= device.size  # no second copy of what is patched
    memory.release()
    assert same(net, before)
    assert all(parameter is parameters[name] for name, parameter in net.named_parameters())


def test_patched_weights_stay_patched_for_the_next_run():
    net, forward = network("stage_c")
    device = Counting(2 * size_of(net))
    memory, patch = DeviceMemory(device, UNIT), lora(net)
    memory.run(net, lambda _: forward(), patches=[patch])
    copied = device.copied
    memory.run(net, lambda _: forward(), patches=[patch])
    assert device.copied == copied


def test_a_lora_of_another_network_is_refused_before_anything_moves():
    net, _ = network("stage_c")
    device = Counting(2 * size_of(net))
    wrong = Patch("other.safetensors", {"clf.1": LowRank(torch.randn(2, 5), torch.randn(16, 2))})
    with pytest.raises(CascadeError, match=r"other\.safetensors changes clf\.1 as a weight of"):
        DeviceMemory(device, UNIT).run(net, lambda _: None, patches=[wrong])
    assert device.peak == 0


@pytest.mark.parametrize("share", [1.5, 0.5])
@torch.inference_mode()
def test_a_run_that_is_broken_off(share):
    net, forward = network("stage_b")
    expected, before = forward(), values(net)
    memory = DeviceMemory(Late(int(share * size_of(net))), UNIT)
    unit_blocks = split_into_units(net, UNIT)[1][-4].blocks

    def stop(*_):
        raise KeyboardInterrupt

    def broken(_):
        forward()
        hook = unit_blocks[0].register_forward_hook(stop)
        try:
            return forward()
        finally:
            hook.remove()

    with pytest.raises(KeyboardInterrupt):
        memory.run(net, broken)
    assert same(net, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())

    def begun_anew(device):  # the run goes on with another forward
        with pytest.raises(KeyboardInterrupt):
            broken(device)
        return [forward(), forward()]

    assert all(torch.equal(result, expected) for result in memory.run(net, begun_anew))
    assert same(net, before)


@torch.inference_mode()
def test_out_of_memory_is_tried_again_in_smaller_placements():
    net, forward = network("stage_c")
    text_model, _ = network("text")
    expected = forward()
    device = Late(size_of(net) + size_of(text_model))
    memory = DeviceMemory(device, UNIT)
    memory.run(text_model, lambda _: None)
    messages, used_bytes = [], []

    def body(_):
        result = forward()
        used_bytes.append(device.now)
        if len(used_bytes) < 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return result

    assert torch.equal(memory.run(net, body, notify=messages.append), expected)
    assert messages == [
        "out of memory; trying again with the other stages off the device.",
        "out of memory; trying again with half of the weights streamed from main memory.",
        "out of memory; trying again with all blocks streamed.",
    ]
    assert used_bytes == sorted(used_bytes, reverse=True)
    assert used_bytes[-1] < 0.35 * size_of(net)
    assert memory.resident_share(text_model) < 1
    with pytest.raises(torch.OutOfMemoryError):  # no placement is small enough
        memory.run(net, lambda _: device.empty(2 * device.size))
    assert device.now <= device.size


@pytest.mark.parametrize("failing", [0, 3, 20])
def test_an_allocation_that_fails_while_a_network_is_placed(failing):
    net, forward = network("stage_c")
    expected, messages = forward(), []
    device = Counting(2 * size_of(net))
    device.failing = {failing}
    assert torch.equal(
        DeviceMemory(device, UNIT).run(net, lambda _: forward(), notify=messages.append), expected
    )
    assert len(messages) == 1


@torch.inference_mode()
def test_what_is_interrupted_while_it_is_placed_keeps_no_memory(monkeypatch):
    net, forward = network("stage_c")
    device = Counting(3 * size_of(net))
    memory = DeviceMemory(device, UNIT)
    expected = memory.run(net, lambda _: forward())
    placement, fetch, number = memory.placements[net], memory.loader.fetch, 0

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal number
        number += 1
        if number == 4:
            raise KeyboardInterrupt
        return fetch(*arguments, **options)

    monkeypatch.setattr(memory.loader, "fetch", interrupted)
    # The patched units, of which some have been copied by then, were on the device.
    with pytest.raises(KeyboardInterrupt):
        memory.run(net, lambda _: forward(), patches=[lora(net)])
    gc.collect()
    assert placement.reserved == placement.resident
    assert 0 < device.now == placement.resident_bytes < size_of(net)
    assert torch.equal(memory.run(net, lambda _: forward()), expected)


class Memory:
    """What torch.cuda says of a card on which others have `others` bytes, and this process has reserved `reserved`."""

    def __init__(self, monkeypatch, total: int, others: int = 0, reserved: int = 0):
        self.fractions = [1.0]
        card = SimpleNamespace(total_memory=total)
        answers = {
            "get_device_properties": lambda device: card,
            "mem_get_info": lambda device: (total - others - reserved, total),
            "memory_reserved": lambda device: reserved,
            "memory_allocated": lambda device: reserved // 2,
            "get_per_process_memory_fraction": lambda device: self.fractions[-1],
            "set_per_process_memory_fraction": lambda fraction, device: self.fractions.append(fraction),
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer, raising=False)
        monkeypatch.setattr(placement_device, "side_stream", lambda device: None)


def test_a_limit_holds_during_runs_alone(monkeypatch):
    fractions = Memory(monkeypatch, 16 << 30).fractions
    small, large = (CudaDevice(torch.device("cuda", 0), limit) for limit in (4 << 30, 8 << 30))
    with suppress(KeyError), small.limited(), small.limited():
        assert fractions[-1] == 0.25
        raise KeyError
    assert fractions[-1] == 1.0
    with large.limited():
        assert fractions[-1] == 0.5
        with small.limited(), large.limited():
            assert fractions[-1] == 0.25
        assert fractions[-1] == 0.5


def test_kernels_find_room_beside_what_torch_reserves(monkeypatch):
    """PyTorch keeps freed memory: on a full card the next kernel could not be loaded."""
    gib = 1 << 30
    fractions = Memory(monkeypatch, 16 * gib, others=gib, reserved=6 * gib).fractions
    whole = CudaDevice(torch.device("cuda", 0))
    usable = 15 * gib - KERNELS
    assert whole.budget(3 * gib) == int(usable * (1 - MARGIN)) - WORKSPACE
    with whole.limited():
        assert fractions[-1] == usable / (16 * gib)
        assert whole.budget(3 * gib) == int(usable * (1 - MARGIN)) - WORKSPACE
    assert fractions[-1] == 1.0


def test_what_counts_as_out_of_memory():
    assert out_of_memory(torch.cuda.OutOfMemoryError())
    assert out_of_memory(
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)")
    )
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not out_of_memory(MemoryError())


def test_stages_leave_as_little_as_need_be():
    stages = [network(kind) for kind in ("text", "stage_c", "stage_b")]
    total = sum(size_of(net) for net, _ in stages)
    expected = [forward() for _, forward in stages]
    device = Counting(int(0.8 * total))
    memory = DeviceMemory(device, UNIT)

    def picture():
        return [memory.run(net, lambda _, forward=forward: forward()) for net, forward in stages]

    for _ in range(3):
        copied = device.copied
        assert all(torch.equal(result, right) for result, right in zip(picture(), expected, strict=True))
    assert device.peak <= device.size
    assert device.copied - copied < 0.55 * total  # a fifth too much leaves and comes back, not everything
    assert memory.free_bytes(stages[0][0]) == device.size - size_of(stages[0][0])
    assert memory.free_bytes(stages[0][0], keep_others=True) < memory.free_bytes(stages[0][0])


@pytest.mark.parametrize("device_class", [Counting, Late])
def test_a_streamed_network_looks_its_embeddings_up_in_main_memory(device_class, monkeypatch):
    monkeypatch.setattr(placement_units, "TABLE_BYTES", 80 * 64 * 4)
    net, forward = network("text")
    table: Any = net.get_submodule("text_model.embeddings.token_embedding")
    expected, before = forward(), values(net)
    units = split_into_units(net, UNIT)[0]
    assert [unit.blocks for unit in units if unit.tensors[0] is table.weight] == [[table]]
    for share, with_table in ((1.1, True), (0.5, False), (1.1, True)):
        device = device_class(int(share * size_of(net)))
        memory = DeviceMemory(device, UNIT)
        assert torch.equal(memory.run(net, lambda _: forward()), expected)
        resident = memory.placements[net].resident
        assert any(table in unit.blocks for unit in resident) == with_table
        assert not table._forward_hooks
        memory.release()
    assert same(net, before)
    # A LoRA that changes it brings it to the device.
    change = LowRank(torch.randn(2, 64), torch.randn(80, 2))
    patch = Patch("some.safetensors", {"text_model.embeddings.token_embedding": change}, 0.3)
    with patched(net, [patch]):
        expected = forward()
    memory = DeviceMemory(device_class(int(0.6 * size_of(net))), UNIT)
    assert torch.equal(memory.run(net, lambda _: forward(), patches=[patch]), expected)
    assert any(table in unit.blocks for unit in memory.placements[net].resident)


def test_a_network_that_runs_once_is_streamed_rather_than_that_others_leave():
    (text, encode), (prior, forward) = network("text"), network("stage_c")
    expected = encode()
    device = Counting(int(size_of(prior) + 0.6 * size_of(text)))
    memory = DeviceMemory(device, UNIT)
    memory.run(prior, lambda _: forward())
    assert torch.equal(memory.run(text, lambda _: encode(), single_use=True), expected)
    assert memory.resident_share(prior) == 1
    assert 0.2 < memory.resident_share(text) < 0.6
    memory.run(text, lambda _: encode())
    assert memory.resident_share(text) == 1
    assert memory.resident_share(prior) < 1


def test_what_nothing_was_made_from_leaves_first():
    stages = {kind: network(kind)[0] for kind in ("stage_c", "text", "stage_b")}
    device = Counting(size_of(stages["stage_c"]) + size_of(stages["text"]) + 60_000)
    memory, derived = DeviceMemory(device, UNIT), Derived(device)
    memory.run(stages["text"], lambda _: None)
    memory.run(stages["stage_c"], lambda _: None, consumer=derived)
    memory.run(stages["stage_b"], lambda _: None)
    assert memory.resident_share(stages["stage_c"]) == 1
    assert memory.resident_share(stages["text"]) < 1


class Derived(WeightConsumer):
    """What an engine makes from weights."""

    def __init__(self, device: Counting):
        self.device = device
        self.offloaded: list[int] = []

    def offload(self) -> None:
        self.offloaded.append(self.device.now)


def test_what_was_made_from_weights_hears_that_they_leave():
    net, _ = network("stage_c")
    device = Counting(2 * size_of(net))
    memory, derived = DeviceMemory(device, UNIT), Derived(device)
    for _ in range(2):
        memory.run(net, lambda _: None, consumer=derived)
    assert derived.placement is memory.placements[net]
    memory.release()
    assert derived.offloaded == [size_of(net)]  # once, and before


class Graphs(WeightConsumer):
    """An engine whose CUDA graphs take `size` bytes until weights leave."""

    def __init__(self, size: int):
        self.size = size

    def offload(self) -> None:
        self.size = 0

    def graph_bytes(self, device: torch.device) -> int:
        return self.size


def test_what_graphs_hold_is_no_room_until_they_leave_with_weights():
    (prior, forward), (decoder, decode) = network("stage_c"), network("stage_b")
    workspace_bytes = 100_000
    device = Counting(size_of(prior) + size_of(decoder) + workspace_bytes)
    memory = DeviceMemory(device, UNIT)
    prior_graphs, decoder_graphs = Graphs(0), Graphs(0)
    memory.run(prior, lambda _: forward(), workspace_bytes, consumer=prior_graphs)
    prior_graphs.size = workspace_bytes
    memory.run(decoder, lambda _: decode())
    assert memory.resident_share(prior) == 1  # its graphs are counted once
    memory.run(prior, lambda _: forward(), workspace_bytes)
    assert memory.resident_share(decoder) == 1
    # The graphs leave less room than that.
    memory.run(decoder, lambda _: decode(), workspace_bytes, consumer=decoder_graphs)
    assert memory.resident_share(prior) < 1
    assert not prior_graphs.size
    decoder_graphs.size = size_of(decoder)
    device.size = size_of(prior) + workspace_bytes
    memory.run(prior, lambda _: forward(), workspace_bytes)  # whole, since both can leave
    assert memory.resident_share(prior) == 1
    assert not decoder_graphs.size


def test_a_network_that_nobody_uses_any_more_leaves():
    net, forward = network("stage_c")
    device = Counting(2 * size_of(net))
    memory = DeviceMemory(device, UNIT)
    memory.run(net, lambda _, forward=forward: forward())
    assert device.now == size_of(net)
    del net, forward
    gc.collect()
    assert device.now == 0


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_from_a_file_through_pinned_memory(tmp_path, dtype):
    net, _ = network("stage_c")
    path = tmp_path / "stage_c.safetensors"
    write_safetensors(path, net.state_dict(), {})
    loaded, _, _ = load_model(path, expect="stage_c", dtype=dtype, read_ahead=False)
    before = values(loaded)
    device = Late(int(0.5 * size_of(loaded)))
    memory = DeviceMemory(device, UNIT)
    memory.run(loaded, lambda _: None)
    path.unlink()  # what was mapped is there all the same
    memory.run(loaded, lambda _: None)
    memory.release()
    assert same(loaded, before)
    units = [unit for placement in memory.placements.values() for unit in placement.units]
    pinned = [(unit.pinned, unit.tensors) for unit in units if unit.pinned is not None]
    assert pinned
    for pinned_bytes, tensors in pinned:  # the pinned bytes are the weights' only ones in main memory
        assert all(t.untyped_storage().data_ptr() == pinned_bytes.data_ptr() for t in tensors)


STORED = {torch.bfloat16: torch.float16, torch.float32: torch.bfloat16, torch.float8_e4m3fn: torch.float16}


@pytest.mark.parametrize("device_class", [Counting, Late])
@pytest.mark.parametrize("share", [1.5, 0.5])  # of what the weights take in the precision that is computed in
@pytest.mark.parametrize(("stored", "computed"), STORED.items())
@torch.inference_mode()
def test_a_file_in_another_precision_is_cast_on_its_way(tmp_path, stored, computed, share, device_class):
    """It has the same values as in main memory, where only the file's pages or the pinned weights are held."""
    net, _ = network("stage_c")
    path = tmp_path / "stage_c.safetensors"
    write_safetensors(path, {name: tensor.to(stored) for name, tensor in net.state_dict().items()}, {})
    in_memory, _, _ = load_model(path, expect="stage_c", dtype=computed)
    placed: Any
    placed, _, _ = load_model(path, expect="stage_c", dtype=computed, placed=True)
    assert {parameter.dtype for parameter in placed.parameters()} == {stored}

    x, r = torch.randn(2, 16, 16, 16).to(computed), torch.rand(2)
    conditions = {"clip_text": torch.randn(2, 7, TEXT_WIDTH), "clip_img": torch.randn(2, 1, 48)}
    conditions["clip_text_pooled"] = torch.randn(2, 1, TEXT_WIDTH)
    conditions = {name: value.to(computed) for name, value in conditions.items()}
    patch = lora(net)
    memory = DeviceMemory(device_class(int(share * size_of(placed))), UNIT)
    for patches in ((), (patch,), ()):
        with patched(in_memory, patches):
            expected = in_memory(x, r, **conditions)
        assert torch.equal(
            memory.run(placed, lambda _: placed(x, r, **conditions), patches=patches), expected
        )
    memory.release()
    units = [unit for placement in memory.placements.values() for unit in placement.units]
    for unit in units:
        in_main_memory = {tensor.dtype for tensor in unit.host_tensors}
        assert in_main_memory == {stored if unit.pinned is None else computed}
    assert compute_dtype(placed) == computed


def test_slots_are_small_where_small_units_are_enough():
    """As in Stage C, units differ in size; the plan copies the fewest bytes a forward, slots counted."""
    small = [Unit([nn.Linear(32, 32)], [torch.zeros(1024)]) for _ in range(8)]
    large = [Unit([nn.Linear(32, 32)], [torch.zeros(2048)]) for _ in range(8)]
    units = [unit for pair in zip(large, small, strict=True) for unit in pair]
    total = sum(unit.size for unit in units)
    plan = plan_streaming(units, units, total - 4096)
    assert (plan.slots, plan.slot_bytes, len(plan.streamed)) == (2, 4096, 3)
    assert plan.streamed < set(small)
    plan = plan_streaming(units, units, total - 8 * 4096)
    assert plan.slot_bytes == 8192


def test_units_hold_every_tensor_once_in_its_own_layout():
    net, _ = network("stage_b")
    with torch.no_grad():
        first: Any = net.get_submodule("embedding.1")
        first.weight.data = first.weight.data.contiguous(memory_format=torch.channels_last)
    units, order = split_into_units(net, UNIT)
    tensors = [tensor for unit in units for tensor in unit.tensors]
    assert {id(tensor) for tensor in tensors} == {
        id(tensor) for tensor in (*net.parameters(), *net.buffers())
    }
    assert len(tensors) == len({id(tensor) for tensor in tensors})
    assert len(order) > len(units) - 1  # levels that repeat
    for unit in units:
        unit_bytes = torch.empty(unit.size, dtype=torch.uint8)
        unit.read_bytes(unit_bytes)
        for tensor, view in zip(unit.tensors, unit.views(unit_bytes), strict=True):
            assert torch.equal(tensor, view)
            assert tensor.stride() == view.stride()


def test_query_key_and_value_lie_side_by_side():
    net, _ = network("stage_c")
    DeviceMemory(SimulatedDevice(2 * size_of(net)), UNIT).run(net, lambda _: None)
    attention: Any = net.get_submodule("down_blocks.0.2.attention.attn")
    q, k, v = (layer.weight for layer in (attention.to_q, attention.to_k, attention.to_v))
    assert k.data_ptr() - q.data_ptr() == v.data_ptr() - k.data_ptr() == q.nbytes


def test_amounts_of_memory():
    assert parse_bytes("6GB") == 6_000_000_000
    assert parse_bytes("5.5 GiB") == 5.5 * 2**30
    assert parse_bytes("800mb") == 800_000_000
    assert parse_bytes("1024") == 1024
    for text in ("", "six", "0", "-1GB", "6GBs", "0.1", "9" * 400 + "GB", "6GB" + " " * 10**6):
        with pytest.raises(CascadeError, match="not an amount of memory; write one such as 6GB"):
            parse_bytes(text)
