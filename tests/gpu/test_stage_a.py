"""Stage A's decoder on a card, against Stage A itself. The engine only decodes."""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any
from unittest.mock import patch

import pytest
import torch

from cascade_nodes.cascade_core.engine import vqgan
from cascade_nodes.tests.gpu.compared import (
    STAGE_A,
    Errors,
    assert_small,
    draw,
    errors_of,
    network_of,
    same_bits,
)
from cascade_nodes.tests.gpu.conftest import Replays

pytestmark = pytest.mark.usefixtures("exact_arithmetic")

ROUNDS = 4  # the first is eager, the second captures a graph, the others replay it
WAYS = ["products", "gelu in the product"]  # of computing a block's MLP

halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


@pytest.fixture(scope="module", autouse=True)
def kernels(capability: tuple[int, int]) -> Any:
    if capability < (8, 0):
        pytest.skip(f"the kernels need compute capability 8.0, and this card has {capability}")
    return import_module("cascade_nodes.cascade_core.engine.kernels.products")


@torch.inference_mode()
def errors(stage_a: Any, engine: vqgan.DecoderEngine, shape: tuple[int, ...], rounds: int = ROUNDS) -> Errors:
    """Errors of `rounds` decodings together, each of another latent; the engine without Stage A's own decoder."""
    exact, like = copy.deepcopy(stage_a).double(), next(stage_a.parameters())
    outputs = []
    for seed in range(rounds):
        latent = draw(shape, like, seed)
        eager = stage_a.decode(latent)
        with patch.object(stage_a, "decode", side_effect=AssertionError("The engine was not used.")):
            computed = engine(latent)
        outputs.append((exact.decode(latent.double()), eager, computed))
    return errors_of(outputs)


@halves
@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (2, 4, 17, 23), (3, 4, 5, 1)])
def test_it_decodes_as_stage_a(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, replays: Replays
):
    stage_a = network_of(STAGE_A, dtype, device)
    assert_small(errors(stage_a, vqgan.DecoderEngine(stage_a), shape), dtype)
    assert replays.count == ROUNDS - 1


@halves
@pytest.mark.parametrize("way", WAYS)
def test_some_lines_at_a_time(
    way: str, dtype: torch.dtype, device: torch.device, kernels: Any, monkeypatch: pytest.MonkeyPatch
):
    """It is decoded like a picture of too many hidden values, in parts that do not divide it."""
    monkeypatch.setattr(vqgan.FusedMixingBlock, "hidden_bytes", 100 * 4 * 96 * 2)  # 100 positions, or 200
    if way != WAYS[0]:
        monkeypatch.setattr(kernels, "choose", lambda *_: kernels.Config(32, 32, 16))
    stage_a = network_of(STAGE_A, dtype, device)
    assert_small(errors(stage_a, vqgan.DecoderEngine(stage_a), (2, 4, 17, 23)), dtype)


def test_what_is_too_large_for_a_graph(
    device: torch.device, replays: Replays, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(vqgan, "MAX_GRAPH_POSITIONS", 2 * 17 * 23 - 1)
    stage_a = network_of(STAGE_A, torch.bfloat16, device)
    engine = vqgan.DecoderEngine(stage_a)
    assert_small(errors(stage_a, engine, (2, 4, 17, 23)), torch.bfloat16)
    assert replays.count == 0
    assert_small(errors(stage_a, engine, (1, 4, 17, 23)), torch.bfloat16)
    assert replays.count == ROUNDS - 1


def test_sizes_take_turns(device: torch.device):
    """There are more sizes than graphs; each gives the same bits again."""
    stage_a = network_of(STAGE_A, torch.bfloat16, device)
    engine = vqgan.DecoderEngine(stage_a)
    sizes = [(8, 8), (9, 7), (5, 12)]
    assert len(sizes) > vqgan.GRAPHS
    latents = [draw((1, 4, *size), next(stage_a.parameters())) for size in sizes]
    results = [[engine(latent) for _ in range(3)] for latent in latents]
    for latent, before in zip(latents, results, strict=True):
        assert torch.equal(before[1], before[2])
        assert same_bits([engine(latent) for _ in range(3)], before)


def test_it_follows_the_weights(device: torch.device):
    stage_a = network_of(STAGE_A, torch.bfloat16, device)
    engine = vqgan.DecoderEngine(stage_a)
    shape = (1, 4, 17, 23)
    assert_small(errors(stage_a, engine, shape), torch.bfloat16)
    gammas = stage_a.up_blocks[1].gammas
    for change in (2.0, -1.0):
        gammas.mul_(change)
        assert_small(errors(stage_a, engine, shape), torch.bfloat16)


def test_float32_is_left_to_stage_a(device: torch.device, replays: Replays):
    stage_a = network_of(STAGE_A, torch.float32, device)
    engine = vqgan.DecoderEngine(stage_a)
    latent = draw((1, 4, 17, 23), next(stage_a.parameters()))
    with torch.inference_mode():
        assert same_bits([engine(latent) for _ in range(3)], 3 * [stage_a.decode(latent)])
    assert replays.count == 0
