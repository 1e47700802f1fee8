"""The workspace of a forward: what it hands out, and that a forward with the fused kernels takes no other memory."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from cascade_nodes.cascade_core import StageB, StageC
from cascade_nodes.cascade_core.engine import Engine, shapes, vqgan, workspace
from cascade_nodes.cascade_core.engine import engine as engine_module
from cascade_nodes.cascade_core.engine.layout import (
    as_image,
    as_tokens,
    patches,
    resized,
    shuffle,
    unpatched,
    unshuffle,
)
from cascade_nodes.cascade_core.networks.config import StageAConfig
from cascade_nodes.cascade_core.networks.fp16 import STREAM_SCALE, scale_residual_stream
from cascade_nodes.cascade_core.networks.layers import resize
from cascade_nodes.cascade_core.networks.quantisation import FORMATS, quantise_network
from cascade_nodes.cascade_core.networks.stage_a import StageA
from cascade_nodes.tests.engine.interpreted import interpreter
from cascade_nodes.tests.engine.test_engine import (
    STAGE_B,
    STAGE_C,
    UNUSUAL,
    build,
    stage_b_inputs,
    stage_c_inputs,
)

LIKE = torch.empty(0)
STAGE_A = StageAConfig(levels=2, bottleneck_blocks=2, c_hidden=24, c_latent=4, codebook_size=8)


def lay_out(lives: list[tuple[int, bool]]) -> tuple[workspace.MemoryPlan, list[tuple[int, int]]]:
    """Requests of this many float32 in turn, each kept or dropped before the next; the plan, and what overlapped."""
    kept: dict[int, Tensor] = {}
    together = []
    with workspace.planning() as plan:
        for number, (count, keep) in enumerate(lives):
            value = workspace.empty((count,), LIKE)
            together += [(number, other) for other in kept]
            if keep:
                kept[number] = value
            if number == 3:
                kept.pop(0, None)
            del value
    return plan, together


def test_what_lives_together_does_not_overlap_and_what_is_gone_gives_its_place():
    plan, together = lay_out(
        [(100, True), (10, False), (300, True), (64, True), (90, False), (200, True), (1, False)]
    )
    spans = [(start, start + size) for start, size in plan.requests]
    for one, other in together:
        assert spans[one][1] <= spans[other][0] or spans[other][1] <= spans[one][0], (one, other)
    assert all(start % workspace.ALIGNMENT == 0 for start, _ in spans)
    assert spans[4][0] == 0  # the first was dropped by then, and its place is the lowest
    assert (
        plan.size
        == max(workspace.aligned(end) for _, end in spans)
        < sum(size for _, size in plan.requests) + 7 * 256
    )


def test_a_view_keeps_its_memory():
    with workspace.planning() as plan:
        view = workspace.empty((64, 2), LIKE).flatten()[:3]
        workspace.empty((5,), LIKE)
    assert plan.requests == [(0, 512), (512, 20)]
    assert len(view) == 3


def test_a_forward_that_asks_for_something_else_is_told():
    with workspace.planning() as plan:
        workspace.empty((4,), LIKE)
    memory = torch.empty(plan.size, dtype=torch.uint8)
    with workspace.within(plan, memory):
        assert workspace.empty((2, 2), LIKE).data_ptr() == memory.data_ptr()
        with pytest.raises(workspace.AllocatesError, match="other memory than the first time"):
            workspace.empty((4,), LIKE)
    with workspace.within(plan, memory), pytest.raises(workspace.AllocatesError):
        workspace.empty((4,), LIKE, torch.float64)


def test_outside_it_memory_is_pytorchs():
    value = workspace.empty((2, 3), LIKE, torch.bfloat16)
    assert (value.shape, value.dtype, value.is_contiguous()) == ((2, 3), torch.bfloat16, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_are_pytorchs(dtype):
    """Tokens of pixels and back, squares and back, and the resize of the networks, to the bit."""
    torch.manual_seed(0)
    image = torch.randn(2, 12, 6, 10).to(dtype)
    for side in (1, 2):
        tokens = unshuffle(image, side)
        assert torch.equal(tokens, as_tokens(torch.nn.functional.pixel_unshuffle(image, side)))
        back = shuffle(tokens, (6 // side, 10 // side), side)
        assert torch.equal(back, image)
        assert back.is_contiguous(memory_format=torch.channels_last)
    tokens = as_tokens(image)
    squares = patches(tokens, (6, 10))
    assert torch.equal(unpatched(squares, (3, 5)), tokens)
    assert torch.equal(squares[:, 6, :12], tokens[:, 22])
    odd = patches(as_tokens(image[..., :5, :9].contiguous()), (5, 9))
    assert torch.equal(odd, patches(as_tokens(image[..., :4, :8].contiguous()), (4, 8)))
    for size in ((6, 10), (9, 7)):
        expected = as_tokens(resize(image, size))
        assert torch.equal(resized(image, size, tokens), expected)
        assert torch.equal(resized(as_image(tokens, (6, 10)), size, tokens), expected)


class Allocations(TorchDispatchMode):
    """Operations whose result lies neither in `memory` nor in what they were given."""

    def __init__(self, memory: Tensor):
        super().__init__()
        self.range = memory.data_ptr(), memory.data_ptr() + memory.nbytes
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                inside = self.range[0] <= tensor.untyped_storage().data_ptr() < self.range[1]
                if not inside:
                    self.found.append(str(func))
        return result


def replayed(forward: Any, x: Tensor) -> tuple[Tensor, Tensor, list[str]]:
    """What a forward gives as it is recorded, and in the memory of its plan, with what it allocates there."""
    with torch.inference_mode():
        with workspace.planning() as plan:
            first = forward(x).clone()
        memory = torch.empty(plan.size, dtype=torch.uint8)
        memory.fill_(0x7F)  # not a number in any of the formats
        with Allocations(memory) as allocations, workspace.within(plan, memory):
            again = forward(x)
        return first, again.clone(), allocations.found


@pytest.fixture(autouse=True)
def kernels_unseen(monkeypatch):
    """What Triton's interpreter computes with is its own."""
    executor = interpreter.GridExecutor
    call = executor.__call__

    def unseen(self: Any, *arguments: Any, **options: Any) -> Any:
        with _disable_current_modes():
            return call(self, *arguments, **options)

    monkeypatch.setattr(executor, "__call__", unseen)


CONTROL = [torch.randn(2, 64, 4, 5), None, torch.randn(2, 64, 2, 2)]


WITH_CONTROL = (stage_c_inputs(STAGE_C)[0], {**stage_c_inputs(STAGE_C)[1], "control": CONTROL})
FORWARDS: dict[str, tuple[Any, ...]] = {
    "C, with control": (StageC, STAGE_C, WITH_CONTROL, "cuda", 1.0),
    "C, unusual": (StageC, UNUSUAL, stage_c_inputs(UNUSUAL), "cuda", 1.0),
    "C, fp8": (StageC, STAGE_C, stage_c_inputs(STAGE_C), "fp8", 1.0),
    "C, dequantised": (StageC, STAGE_C, stage_c_inputs(STAGE_C), "int8", 1.0),
    "B": (StageB, STAGE_B, stage_b_inputs(STAGE_B, size=(8, 8)), "cuda", 1.0),
    # Levels that do not divide the one above
    "B, odd": (StageB, STAGE_B, stage_b_inputs(STAGE_B, size=(10, 14)), "cuda", 1.0),
    # With the residual stream held as fp16 holds it
    "C, scaled": (StageC, UNUSUAL, stage_c_inputs(UNUSUAL), "cuda", STREAM_SCALE),
    "B, scaled": (StageB, STAGE_B, stage_b_inputs(STAGE_B, size=(10, 14)), "cuda", STREAM_SCALE),
    "C, before Ampere": (StageC, UNUSUAL, stage_c_inputs(UNUSUAL), "cublas", STREAM_SCALE),
    "B, before Ampere": (StageB, STAGE_B, stage_b_inputs(STAGE_B, size=(8, 8)), "cublas", STREAM_SCALE),
}
ALLOCATING = {"cublas": {"aten.scaled_dot_product_attention.default"}}  # PyTorch's attention alone


@pytest.mark.parametrize(
    ("network_class", "config", "inputs", "ops", "scale"), FORWARDS.values(), ids=FORWARDS
)
def test_a_forward_takes_no_other_memory(monkeypatch, network_class, config, inputs, ops, scale):
    """Interpreted kernels, whose own work in main memory is not seen: all that PyTorch computes."""
    from cascade_nodes.cascade_core.engine import cublas, cuda, fp8

    modules = {"cuda": cuda, "fp8": fp8, "int8": cuda, "cublas": cublas}
    monkeypatch.setattr(engine_module, "operations_on", lambda device, precision: modules[ops])
    found: list[str] = []

    def run(self: Any, bound: Any, ops: Any, x: Tensor, cache: Any) -> Tensor:
        first, again, allocated = replayed(lambda x: bound.run(ops, x, cache), x)
        assert torch.equal(first, again)
        found.extend(allocated)
        return again

    monkeypatch.setattr(shapes.ShapeCache, "run", run)
    network = build(network_class, config)
    if ops in FORMATS:
        quantise_network(network, FORMATS[ops])
    x, conditions = inputs
    scale_residual_stream(network, scale)
    Engine(network)(x, torch.full((len(x),), 0.7), **conditions)
    assert set(found) == ALLOCATING.get(ops, set())


def test_stage_a_takes_no_other_memory(monkeypatch):
    monkeypatch.setitem(vqgan.BINDINGS, "cpu", vqgan.BINDINGS["cuda"])
    torch.manual_seed(0)
    stage_a = StageA(STAGE_A).eval().requires_grad_(False)
    for parameter in stage_a.parameters():
        parameter.normal_(0, 0.3)
    engine = vqgan.DecoderEngine(stage_a)
    latent = torch.randn(2, 4, 5, 7)
    engine(latent)
    first, again, allocated = replayed(engine._decode, latent)
    assert torch.equal(first, again)
    assert set(allocated) == set()
