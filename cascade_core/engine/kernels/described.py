"""Compiling for a card that this machine does not have.  As always, compiled kernels go into Triton's cache on disk."""

from __future__ import annotations

from collections.abc import Callable

import triton
from triton.backends.compiler import GPUTarget

from ..card import Card, described
from .launch import compile_ahead


class DescribedDriver:
    """Triton driver for a described card: it answers the compiler's questions and launches nothing."""

    def __init__(self, card: Card):
        major, minor = card.capability
        self.capability = 10 * major + minor

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # the key of Triton's cache in memory

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_for(card: Card, forward: Callable[[], object]) -> None:
    """Compiles what `forward` launches on the meta device. No kernel can be launched in this process afterwards."""
    triton.runtime.driver.set_active(DescribedDriver(card))  # type: ignore[arg-type] (as much of one as is asked for)
    with described(card):
        compile_ahead(forward)
