"""Promised figures, each read from the measured results."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from machine import print_table
from programs.comfyui import MODULES, SAMPLING
from programs.diffusers import NAME as DIFFUSERS
from programs.ours import EAGER, ENGINE, FP8

Results = dict[Any, Any]
BETTER_BY = 4.5


@dataclass(frozen=True)
class Target:
    """Promise about one figure. `read` returns it, or raises LookupError where its measurement did not run."""

    name: str
    unit: str
    bound: float
    read: Callable[[Results], float]
    at_least: bool = False

    def row(self, results: Results) -> list[str]:
        sign = "≥" if self.at_least else "≤"
        target = f"{sign} {self.bound:g} {self.unit}".strip()
        try:
            value = self.read(results)
        except LookupError:
            return [self.name, "", target, "not measured"]
        met = value >= self.bound if self.at_least else value <= self.bound
        return [self.name, f"{value:.3g} {self.unit}".strip(), target, "met" if met else "missed"]


def _forward(kind: str, program: str = ENGINE) -> Callable[[Results], float]:
    return lambda results: results["forward"][kind]["programs"][program]["ms"]


def _picture(program: str, group: str = "programs") -> Callable[[Results], float]:
    return lambda results: results["picture"][group][program]["whole"]


def _faster_than(program: str) -> Callable[[Results], float]:
    return lambda results: _picture(program)(results) / _picture(ENGINE)(results)


def _error_over_eager(kind: str, quantity: str, program: str = ENGINE) -> Callable[[Results], float]:
    """Error relative to eager's, to two decimals, because rounding moves both up and down."""

    def read(results: Results) -> float:
        programs = results["error"][kind]
        return round(programs[program][quantity] / programs[EAGER][quantity], 2)

    return read


TARGETS = [
    Target("Stage C, forward of two rows", "ms", 15, _forward("stage_c")),
    Target("Stage B, forward of two rows", "ms", 26, _forward("stage_b")),
    Target("Stage A, decode", "ms", 8, _forward("stage_a")),
    Target("whole picture", "s", 0.60, _picture(ENGINE)),
    Target("whole picture, fp8", "s", 0.45, _picture(FP8)),
    Target("four pictures", "s", 1.9, _picture(ENGINE, "of_4")),
    Target("faster than ComfyUI", "×", BETTER_BY, _faster_than(SAMPLING), at_least=True),
    Target("faster than ComfyUI's modules in our loop", "×", BETTER_BY, _faster_than(MODULES), at_least=True),
    Target("faster than diffusers", "×", BETTER_BY, _faster_than(DIFFUSERS), at_least=True),
    *(
        Target(f"Stage {kind[-1].upper()}, {name}: error over eager's", "", 1, _error_over_eager(kind, name))
        for kind in ("stage_c", "stage_b")
        for name in ("forward", "latent")
    ),
    Target("first picture, nothing compiled", "s", 12, lambda results: results["first"]["cold"]["first"]),
    Target("first picture, kernels compiled", "s", 3, lambda results: results["first"]["warm"]["first"]),
]


def report(results: Results) -> None:
    print_table(["target", "measured", "promised", ""], [target.row(results) for target in TARGETS])
