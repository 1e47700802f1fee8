"""A real NVIDIA card: kernels are compiled, CUDA graphs captured. In a process of its own: `pytest tests/gpu`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

FOLDER = Path(__file__).parent
ALONE = "run `pytest tests/gpu` on a machine with an NVIDIA card, in a process of its own"


def missing() -> str | None:
    """Why these tests cannot run in this process, or None."""
    if not torch.cuda.is_available():
        return "there is no NVIDIA card here"
    if _interpreted():
        return "Triton interprets its kernels in this process, as tests/engine has it do"
    return None


def _interpreted() -> bool:
    # Not imported for this: tests/engine sets its interpreter up before anything imports Triton.
    triton = sys.modules.get("triton")
    if triton is None:
        return os.environ.get("TRITON_INTERPRET", "0") == "1"
    return bool(triton.knobs.runtime.interpret)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is in this folder. All files have been collected by now: what interprets kernels has been imported."""
    ours = [item for item in items if item.path.is_relative_to(FOLDER)]
    reason = missing() if ours else None
    for item in ours:
        item.add_marker(pytest.mark.gpu)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=f"{reason}; {ALONE}"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The card, as tensors on it name it."""
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session")
def capability(device: torch.device) -> tuple[int, int]:
    """The card's compute capability: (8, 0) Ampere, (8, 9) Ada, (9, 0) Hopper."""
    return torch.cuda.get_device_capability(device)


@pytest.fixture
def exact_arithmetic() -> Iterator[None]:
    """Makes float32 exact, in convolutions too, and makes cuDNN add in the same order each time."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        matmul.allow_tf32 = before


class Replays:
    """How often graphs were replayed."""

    count = 0

    def since(self, before: int) -> int:
        return self.count - before


@pytest.fixture
def replays() -> Iterator[Replays]:
    """Counts the CUDA graphs that are replayed during the test."""
    counted, replay = Replays(), torch.cuda.CUDAGraph.replay

    def count(graph: torch.cuda.CUDAGraph) -> None:
        counted.count += 1
        replay(graph)

    with patch.object(torch.cuda.CUDAGraph, "replay", count):
        yield counted
