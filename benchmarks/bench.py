"""What the parts of benchmarks/gpu.py share: the programs, built when they are first asked for, and the limits."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ceilings import Arithmetic, measure_ceilings
from loop import Program, Sampling
from networks import Setup
from programs.comfyui import ComfyUI, find_checkout
from programs.diffusers import Diffusers
from programs.ours import FP8, Ours

OURS, COMFYUI, DIFFUSERS = "ours", "comfyui", "diffusers"
PROGRAMS = (OURS, COMFYUI, DIFFUSERS)


@dataclass
class Bench:
    """`missing` says why a program that was asked for does not run, `errors` what failed of those that do."""

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
        """The time of so much arithmetic at the measured ceiling."""
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
        """Those whose networks can be called one by one."""
        ours = [self.ours.program(name) for name in self.ours.names()]
        return ours + ([self.comfyui.program()] if self.comfyui else [])

    def samplings(self) -> list[Sampling]:
        """Those that make whole pictures by themselves."""
        return [program.sampling() for program in (self.comfyui, self.diffusers) if program]

    @contextmanager
    def apart(self, what: str) -> Iterator[None]:
        """What fails in here is printed and kept in `errors`; the other programs are measured all the same."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.errors.append(f"{what}: {type(error).__name__}: {error}")

    def _found(self, name: str, build: Any) -> Any:
        try:
            return build()
        except ImportError as error:
            self.missing[name] = str(error)
            return None
