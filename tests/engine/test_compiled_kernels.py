"""Kernels that the engine launches on each kind of card, compiled here without one.

What a kernel is compiled for is collected from real forwards: of the published widths, on the meta device, for a
described card (`compiled_kernels.py`). What is compiled is what that card would run.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cascade_nodes.cascade_core.engine import kernels
from cascade_nodes.cascade_core.engine.card import Card
from cascade_nodes.cascade_core.engine.kernels import tuned

SHARED = {  # KiB of shared memory that a program can have, by compute capability
    "7.0": 96, "7.5": 64, "8.0": 163, "8.6": 99, "8.9": 99, "9.0": 227, "10.0": 227, "12.0": 99,
}  # fmt: skip
REGISTERS = 65536  # of a multiprocessor
THREAD_REGISTERS = 255
SPILLED = 128  # bytes a thread that a kernel may keep in memory for want of registers
# 392 where an image's rows are not a multiple of the tuned product's tile, which then loads without TMA.
SPILLED_AT_UNUSUAL_SIZES = 400


def compiled(capability: str, *options: str) -> list[dict]:
    program = [sys.executable, "-m", "cascade_nodes.tests.engine.compiled_kernels", capability, *options]
    result = subprocess.run(program, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def check(kernels: list[dict], capability: str, spilled: int = SPILLED) -> None:
    for kernel in kernels:
        described = f"{kernel} on {capability}"
        assert kernel["shared"] <= SHARED[capability] * 1024, described
        assert kernel["registers"] <= THREAD_REGISTERS, described
        # Registers are given out in eights.
        assert -(-kernel["registers"] // 8) * 8 * kernel["threads"] <= REGISTERS, described
        assert kernel["spilled"] <= spilled, described
        assert bool(kernel["instructions"]) == kernel["dot"], described


@pytest.mark.parametrize("capability", SHARED)
def test_kernels_fit_the_card_and_multiply_by_its_matrix_instructions(capability):
    usual = compiled(capability, "--cover")
    check(usual, capability)
    assert usual


@pytest.mark.nightly
def test_all_forms_of_all_kernels():
    """Of both sizes of Stage B and C, several sizes of pictures and batches; no kernel is left out."""
    seen = set()
    for capability in SHARED:
        everything = compiled(capability, "--unusual")
        check(everything, capability, SPILLED_AT_UNUSUAL_SIZES)
        seen |= {kernel["kernel"] for kernel in everything}
    sources = [path.read_text(encoding="utf-8") for path in Path(kernels.__path__[0]).glob("*.py")]
    assert seen == {name for source in sources for name in re.findall(r"launch\((_\w+|product), ", source)}


def test_a_card_without_a_measurement_multiplies_by_cublas():
    table = json.loads(tuned.TABLE.read_text(encoding="utf-8"))
    assert {name.split()[0] for name in table} <= set(SHARED)
    card = Card((8, 6), "NVIDIA GeForce RTX 3060", 28)
    assert tuned.for_device(table, tuned.device_key(card)) == {}
