"""Kernels that fail: to compile, to launch, in a later shape, with fp8, in Stage A. No run ends for them."""

from typing import Any

import pytest
import torch

from cascade_nodes.cascade_core import StageB, StageC
from cascade_nodes.cascade_core.engine import Engine, cuda, fallback, fp8, operations, vqgan
from cascade_nodes.cascade_core.engine import engine as engine_module
from cascade_nodes.cascade_core.engine.kernels import vqgan as vqgan_kernels
from cascade_nodes.cascade_core.errors import CascadeError, Interrupted
from cascade_nodes.cascade_core.networks.config import StageAConfig
from cascade_nodes.cascade_core.networks.quantisation import E4M3, quantise_network
from cascade_nodes.cascade_core.networks.stage_a import StageA
from cascade_nodes.cascade_core.placement import DeviceMemory, SimulatedDevice
from cascade_nodes.tests.engine.test_engine import STAGE_B, STAGE_C, build, stage_b_inputs, stage_c_inputs

CALLS = {
    "C": (StageC, STAGE_C, stage_c_inputs(STAGE_C), stage_c_inputs(STAGE_C, batch=1)),
    "B": (StageB, STAGE_B, stage_b_inputs(STAGE_B), stage_b_inputs(STAGE_B, batch=1)),
}


class Failing:
    """Operations of which some raise an error, as a kernel would at this shape, after others have changed x."""

    def __init__(self, ops: Any, name: str, error: Exception, batch: int | None = None):
        self.ops, self.name, self.error, self.batch = ops, name, error, batch
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.ops, name)
        if name != self.name:
            return function

        def failing(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            batch = len(arguments[0]) if isinstance(arguments[0], torch.Tensor) else None
            if (self.batch is None or batch == self.batch) and self.calls > 1:  # the first changes x in place
                raise self.error
            return function(*arguments, **options)

        return failing


class CompileFails(Failing):
    def compile_ahead(self, forward: Any) -> None:
        raise self.error


@pytest.fixture
def use(monkeypatch):
    """Makes these the operations of each precision; the plain ones stay."""

    def use(**ways: Any) -> None:
        chosen = {"plain": operations, **ways}
        monkeypatch.setattr(engine_module, "operations_on", lambda device, way: chosen[way])

    return use


def forward(engine, x, conditions):
    return engine(x, torch.full((len(x),), 0.7), **conditions)


def plain(network, *call):
    return forward(Engine(network), *call)


LAUNCH = RuntimeError("Triton Error [CUDA]: invalid argument")
FAULTS = {
    "compile": CompileFails(cuda, "", OSError("Failed to find C compiler.")),
    "first operation": Failing(cuda, "norm", LAUNCH),
    "launch": Failing(cuda, "channelwise_", LAUNCH),
    "attention": Failing(cuda, "attention", LAUNCH),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize(("network_class", "config", "call", "_"), CALLS.values(), ids=CALLS)
def test_the_network_goes_on_in_plain_pytorch(use, network_class, config, call, _, fault):
    fault.calls = 0
    network, said = build(network_class, config), []
    expected = plain(network, *call)
    use(exact=fault)
    engine = Engine(network, notify=said.append)
    assert all(torch.equal(forward(engine, *call), expected) for _ in range(3))
    name = {StageC: "Stage C", StageB: "Stage B"}[network_class]
    kind = type(fault.error).__name__
    assert said == [
        f"{name}: a kernel failed on the processor ({kind}: {fault.error}); it goes on in plain PyTorch, which takes "
        "about twice as long."
    ]


def test_the_second_shape_alone(use):
    network, said = build(StageC, STAGE_C), []
    first, second = stage_c_inputs(STAGE_C), stage_c_inputs(STAGE_C, batch=1)
    expected = plain(network, *first), plain(network, *second)
    use(exact=Failing(cuda, "attention", LAUNCH, batch=1))
    engine = Engine(network, notify=said.append)
    assert not torch.equal(forward(engine, *first), expected[0])  # kernels round otherwise
    assert said == []
    assert torch.equal(forward(engine, *second), expected[1])
    assert torch.equal(forward(engine, *first), expected[0])
    assert len(said) == 1


def test_the_next_network_tries_its_kernels(use):
    fault = Failing(cuda, "attention", LAUNCH)
    use(exact=fault)
    for count in (1, 2):
        said = []
        forward(Engine(build(StageC, STAGE_C), notify=said.append), *stage_c_inputs(STAGE_C))
        assert len(said) == 1
        fault.calls, tried = 0, fault.calls
        assert tried == 2, count


def test_changed_weights_stay_in_plain_pytorch(use):
    network, call, said = build(StageC, STAGE_C), stage_c_inputs(STAGE_C), []
    fault = Failing(cuda, "attention", LAUNCH)
    use(exact=fault)
    engine = Engine(network, notify=said.append)
    forward(engine, *call)
    network.clf[1].weight.data.mul_(2)
    network.clf[1].weight.add_(0.1)
    assert torch.equal(forward(engine, *call), operations_alone(network, call))
    assert (len(said), fault.calls) == (1, 2)


def test_fp8_goes_on_exactly_and_then_plainly(use):
    network, call, said = quantise_network(build(StageC, STAGE_C), E4M3), stage_c_inputs(STAGE_C), []
    use(exact=cuda)
    exact = forward(Engine(network), *call)
    use(fp8=Failing(fp8, "project", LAUNCH), exact=cuda)
    engine = Engine(network, notify=said.append)
    assert torch.equal(forward(engine, *call), exact)
    assert len(said) == 1
    assert "Stage C: a kernel failed" in said[0]
    assert said[0].endswith(
        "it goes on in the precision of its biases, weight after weight, which takes longer."
    )

    said.clear()
    use(fp8=Failing(fp8, "project", LAUNCH), exact=CompileFails(cuda, "", LAUNCH))
    engine = Engine(network, notify=said.append)
    expected = operations_alone(network, call)
    assert all(torch.equal(forward(engine, *call), expected) for _ in range(2))
    assert [sentence.rpartition("goes on ")[2] for sentence in said] == [
        "in the precision of its biases, weight after weight, which takes longer.",
        "in plain PyTorch, which takes about twice as long.",
    ]


def operations_alone(network, call):
    """What plain operations compute, whatever `operations_on` says."""
    engine = Engine(network)
    engine._fallback.ways = engine._fallback.ways[-1:]
    return forward(engine, *call)


def test_a_streamed_network_begins_again(use):
    network, call, said = build(StageC, STAGE_C), stage_c_inputs(STAGE_C), []
    use(exact=Failing(cuda, "attention", LAUNCH))
    engine = Engine(network, notify=said.append)
    size = sum(parameter.nbytes for parameter in network.parameters())
    memory = DeviceMemory(SimulatedDevice(size // 2), unit_bytes=size // 12)

    def body(device):
        assert engine.placement is not None
        assert engine.placement.stream is not None
        return [forward(engine, *call) for _ in range(2)]

    expected = operations_alone(network, call)
    assert all(torch.equal(each, expected) for each in memory.run(network, body, consumer=engine))
    assert len(said) == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        CascadeError("A sentence."),
        Interrupted("The run was stopped."),
    ],
)
def test_what_is_not_a_failed_kernel(use, error):
    network, call, said = build(StageC, STAGE_C), stage_c_inputs(STAGE_C), []
    fault = Failing(cuda, "attention", error)
    use(exact=fault)
    engine = Engine(network, notify=said.append)
    with pytest.raises(type(error)) as raised:
        forward(engine, *call)
    assert raised.value is error
    fault.error = LAUNCH
    fault.name = "none"
    forward(engine, *call)  # the kernels are still in use
    assert fault.ops is cuda
    assert said == []
    assert engine._bound_way == "exact"


def test_a_wrong_input_costs_no_kernels(use):
    network, (x, conditions), said = build(StageC, STAGE_C), stage_c_inputs(STAGE_C), []
    use(exact=cuda)
    engine = Engine(network, notify=said.append)
    with pytest.raises(RuntimeError, match=r"shape|size"):
        forward(engine, x, {**conditions, "clip_text": torch.randn(2, 7, 3)})
    forward(engine, x, conditions)
    assert said == []
    assert engine._bound_way == "exact"


def test_a_device_that_computes_nothing_any_more(use, monkeypatch):
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")
    network, call, said = build(StageC, STAGE_C), stage_c_inputs(STAGE_C), []
    use(exact=Failing(cuda, "attention", lost))
    monkeypatch.setattr(fallback, "still_computes", lambda device: False)
    with pytest.raises(
        CascadeError, match=r"^Stage C: the processor stopped computing \(RuntimeError: CUDA error: an"
    ):
        forward(Engine(network, notify=said.append), *call)
    assert said == []


@pytest.mark.parametrize(("failures", "computes"), [(0, True), (1, True), (9, False)])
def test_what_is_left_of_an_error_is_cleared(monkeypatch, failures, computes):
    """As with CUDA: the first call after a failed launch may raise its error again; a lost context always does."""
    left = [RuntimeError("CUDA error: an illegal memory access was encountered")] * failures

    def synchronize(device: torch.device) -> None:
        if left:
            raise left.pop()

    monkeypatch.setattr(fallback, "synchronize", synchronize)
    assert fallback.still_computes(torch.device("meta")) is computes


STAGE_A = StageAConfig(levels=2, bottleneck_blocks=2, c_hidden=24, c_latent=4, codebook_size=8)


@pytest.mark.parametrize("kernel", ["gelu", "norm_modulate"])
def test_stage_a_decodes_itself(monkeypatch, kernel):
    torch.manual_seed(0)
    stage_a = StageA(STAGE_A).eval().requires_grad_(False)
    for parameter in stage_a.parameters():
        parameter.normal_(0, 0.3)
    monkeypatch.setitem(vqgan.BINDINGS, "cpu", vqgan.BINDINGS["cuda"])

    def fails(*_: Any) -> None:
        raise LAUNCH

    latents, said = [torch.randn(1, 4, 6, side) for side in (6, 8, 6)], []
    engine = vqgan.DecoderEngine(stage_a, said.append)
    with torch.inference_mode():
        expected = [stage_a.decode(latent) for latent in latents]
    assert not torch.equal(engine(latents[0]), expected[0])
    monkeypatch.setattr(vqgan_kernels, kernel, fails)
    assert all(
        torch.equal(engine(latent), decoded) for latent, decoded in zip(latents, expected, strict=True)
    )
    assert len(said) == 1
    assert said[0].startswith("Stage A: a kernel failed on the processor (RuntimeError: Triton Error")
