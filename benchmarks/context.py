"""Context that the measurements of benchmarks/gpu.py share: programs, built when first asked for, and limits."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ceilings import Arithmetic, measure_ceilings
from networks import Setup
from picture import Program, Sampling
from programs.comfyui import ComfyUI, find_checkout
from programs.diffusers import Diffusers
from programs.ours import FP8, Ours

OURS, COMFYUI, DIFFUSERS = "ours", "comfyui", "diffusers"
PROGRAMS = (OURS, COMFYUI, DIFFUSERS)


@dataclass
class Context:
    """Setup and programs of one run of the benchmark.

    `missing` gives the reason why a requested program does not run, `errors` the failures of those that do.
    """

    setup: Setup
    tiny: bool
    wanted: tuple[str, ...] = PROGRAMS
    checkout: Path | None = None
    missing: dict[str, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    @cached_property
    def ours(self) -> Ours:
        return Ours(self.setup)

    @cached_property
    def ceilings(self) -> dict[str, float]:
        return measure_ceilings(self.setup)

    @cached_property
    def arithmetic(self) -> Arithmetic:
        return Arithmetic(self.setup)

    def limit_ms(self, tflop: float, program: str = "") -> float:
        """Milliseconds for this much arithmetic at the measured ceiling."""
        ceiling = "fp8_tflops" if program == FP8 else "bf16_tflops"
        return 1000 * tflop / self.ceilings[ceiling]

    @cached_property
    def comfyui(self) -> ComfyUI | None:
        checkout = find_checkout(self.checkout)
        if COMFYUI not in self.wanted:
            return None
        if checkout is None:
            self.missing[COMFYUI] = "no checkout: name one by --comfyui or COMFYUI_PATH"
            return None
        return self._found(COMFYUI, lambda: ComfyUI(checkout, self.setup, self.ours))

    @cached_property
    def diffusers(self) -> Diffusers | None:
        if DIFFUSERS not in self.wanted:
            return None
        return self._found(DIFFUSERS, lambda: Diffusers(self.setup, self.ours))

    def programs(self) -> list[Program]:
        """Programs whose networks can be called one by one."""
        ours = [self.ours.program(name) for name in self.ours.names()]
        return ours + ([self.comfyui.program()] if self.comfyui else [])

    def samplings(self) -> list[Sampling]:
        """Programs that make whole pictures by themselves."""
        return [program.sampling() for program in (self.comfyui, self.diffusers) if program]

    @contextmanager
    def isolated(self, name: str) -> Iterator[None]:
        """Prints an error raised inside and appends it to `errors`, so that the other programs are still measured."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.errors.append(f"{name}: {type(error).__name__}: {error}")

    def _found(self, name: str, build: Any) -> Any:
        try:
            return build()
        except ImportError as error:
            self.missing[name] = str(error)
            return None
